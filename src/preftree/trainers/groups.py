"""What one example of the data adds to a batch: its token sequences, and which of them are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch

from preftree.images import PromptImages
from preftree.models.rotary import RotaryLimit
from preftree.objectives import lambda_weights
from preftree.tree import TokenTree

# Columns of a tokenised ranked example: its responses (prompt included) as token ids, their prompt lengths, their scores.
SEQUENCES, PROMPT_LENGTHS, SCORES = "sequences", "prompt_lengths", "scores"
# And, where the user gives them, its pairs: (index of the better one, index of the worse one, weight).
PAIR_WEIGHTS = "pair_weights"
RANKED_COLUMNS = (SEQUENCES, PROMPT_LENGTHS, SCORES, PAIR_WEIGHTS)
# Where the reference's log-probabilities of a ranked example's responses stand, a list for each example.
RANKED_REFERENCE = "ref_logps"
WEIGHTINGS = ("pair", "prompt", "lambda")


@dataclass
class Group:
    """The sequences of one example. Each unit (a pair, or a single completion) names one sequence for each side.

    Attributes:
        sequences: token ids, prompt and completion.
        prompt_lengths: leading tokens of each that are not scored.
        multiplicities: how often each counts in sums over all sequences.
        sides: for each side ("chosen", "rejected", ...) the index of its sequence in every unit.
        weights: of the units, before division by what the batch divides by.
        normaliser: what this example adds to the number that the batch's loss is divided by.
        ranking: the sequences from best to worst, where a list objective asks for it.
        images: of the prompt, which all sequences begin with, or None.
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    multiplicities: list[int]
    sides: dict[str, list[int]]
    weights: list[float]
    normaliser: float = 1.0
    ranking: list[int] = field(default_factory=list)
    images: PromptImages | None = None

    @property
    def begins_with(self) -> tuple[bytes, tuple[int, ...]]:
        """Equal for groups whose sequences may share tokens: ids do not tell one image from another."""
        if self.images is None:
            return b"", ()
        return self.images.digest, tuple(self.sequences[0][: self.images.length])

    @property
    def units(self) -> int:
        return len(self.weights)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences one by one, each as often as it counts."""
        return sum(len(ids) * count for ids, count in zip(self.sequences, self.multiplicities, strict=True))

    def tree(self) -> TokenTree:
        return TokenTree.from_sequences(self.sequences, self.prompt_lengths, self.multiplicities, self.images)


def laid_out(tree: TokenTree, share_prefixes: bool, limit: RotaryLimit | None) -> TokenTree:
    """A tree as it stands in a row: side by side where nothing is to be shared, or its sequences' frequencies differ."""
    shares = share_prefixes and (limit is None or not limit.divides(map(len, tree.paths)))
    return tree if shares else tree.unshared()


def truncate(ids: Sequence[int], prompt_length: int, max_length: int | None, mode: str) -> tuple[list[int], int]:
    """One sequence cut to ``max_length`` tokens as TRL cuts it, and how many of its tokens belong to the prompt.

    Args:
        mode: "keep_start" cuts the completion's end, "keep_end" the prompt's beginning.
    """
    surplus = 0 if max_length is None else max(len(ids) - max_length, 0)
    if mode == "keep_start":
        return list(ids[: len(ids) - surplus]), min(prompt_length, len(ids) - surplus)
    if mode == "keep_end":
        return list(ids[surplus:]), max(prompt_length - surplus, 0)
    raise ValueError(f"unknown truncation_mode {mode!r}: choose 'keep_start' or 'keep_end'")


@dataclass(frozen=True)
class Layout:
    """How a trainer's tokenised examples are read: which sequences they hold, and which of them make a unit.

    Attributes:
        sides: names of the sequences of a unit.
        form: where a side's tokens stand. "prompt": `prompt_ids` and ``<side>_ids``, one behind the other. "labels":
            ``<side>_input_ids``, whose prompt has the label -100 in ``<side>_labels``. "whole": ``<side>_ids``, no prompt
            marked off.
        whole_chosen: add the side "chosen_whole": the chosen sequence again, every token but its first one scored.
        weighting: of a ranked example's pairs: "pair" (each counts 1, as if they were listed one by one), "prompt" (each
            prompt counts 1) or "lambda" (LiPO's weights).
        per_pair: list a ranked example's response anew in every pair (on the same nodes): for losses in which what a
            response counts depends on the other one.
        lists: keep the ranking of ranked examples, for a list objective.
        max_length, truncation_mode: sequences are cut as TRL cuts them.
    """

    sides: tuple[str, ...] = ("chosen", "rejected")
    form: str = "prompt"
    whole_chosen: bool = False
    weighting: str = "pair"
    per_pair: bool = False
    lists: bool = False
    max_length: int | None = None
    truncation_mode: str = "keep_start"

    # ------------------------------------------------------------------------------------------------------- reading

    def token_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns that this layout reads, of those that there are."""
        if SEQUENCES in columns:
            return [name for name in RANKED_COLUMNS if name in columns]
        names = {
            "prompt": ["prompt_ids", *(f"{side}_ids" for side in self.sides)],
            "labels": [f"{side}_{kind}" for side in self.sides for kind in ("input_ids", "labels")],
            "whole": [f"{side}_ids" for side in self.sides],
        }[self.form]
        return [name for name in names if name in columns]

    def members(self, example: Mapping[str, Any]) -> dict[str, tuple[list[int], int]]:
        """``{name: (token ids, prompt length)}`` of all sequences before truncation; names are those of the data."""
        if SEQUENCES in example:
            pairs = zip(example[SEQUENCES], example[PROMPT_LENGTHS], strict=True)
            return {f"completions[{index}]": (list(ids), length) for index, (ids, length) in enumerate(pairs)}
        return {side: self._side(example, side) for side in self.sides}

    def _side(self, example: Mapping[str, Any], side: str) -> tuple[list[int], int]:
        if self.form == "prompt":
            return [*example["prompt_ids"], *example[f"{side}_ids"]], len(example["prompt_ids"])
        if self.form == "labels":
            labels = example[f"{side}_labels"]
            prompt_length = next((index for index, label in enumerate(labels) if label != -100), len(labels))
            return list(example[f"{side}_input_ids"]), prompt_length
        return list(example[f"{side}_ids"]), 0

    def cut(self, example: Mapping[str, Any], length: int) -> dict[str, Any]:
        """The example with every sequence cut to its first ``length`` tokens."""
        changed: dict[str, Any] = {}
        if SEQUENCES in example:
            changed[SEQUENCES] = [list(ids)[:length] for ids in example[SEQUENCES]]
        elif self.form == "prompt":
            room = max(length - len(example["prompt_ids"]), 0)
            changed = {f"{side}_ids": list(example[f"{side}_ids"])[:room] for side in self.sides}
        elif self.form == "labels":
            kinds = ("input_ids", "labels", "attention_mask")
            names = [f"{side}_{kind}" for side in self.sides for kind in kinds]
            changed = {name: list(example[name])[:length] for name in names if name in example}
        else:
            changed = {f"{side}_ids": list(example[f"{side}_ids"])[:length] for side in self.sides}
        return {**example, **changed}

    # ------------------------------------------------------------------------------------------------------ grouping

    def group(self, example: Mapping[str, Any]) -> Group:
        """The sequences of an example, cut, and its units."""
        cut = [
            truncate(ids, length, self.max_length, self.truncation_mode)
            for ids, length in self.members(example).values()
        ]
        sequences, prompt_lengths = [ids for ids, _ in cut], [length for _, length in cut]
        if SEQUENCES in example:
            group = self._ranked(sequences, prompt_lengths, example[SCORES], example.get(PAIR_WEIGHTS))
        else:
            sides = {side: [index] for index, side in enumerate(self.sides)}
            group = Group(sequences, prompt_lengths, [1] * len(sequences), sides, [1.0], ranking=self._pair_ranking())
        return self._with_whole(group) if self.whole_chosen else group

    def _pair_ranking(self) -> list[int]:
        """A pair as a ranked list of two."""
        return [self.sides.index("chosen"), self.sides.index("rejected")] if self.lists else []

    def _ranked(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        scores: Sequence[float],
        given: Sequence[Sequence[float]] | None,
    ) -> Group:
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        pairs = [(better, worse) for better, worse in combinations(order, 2) if scores[better] > scores[worse]]
        if given is not None:
            pairs = [(int(better), int(worse)) for better, worse, _ in given]
        multiplicities = [sum(index in pair for pair in pairs) for index in range(len(sequences))]
        weights, normaliser = [1.0] * len(pairs), float(len(pairs))
        if given is not None:
            weights = [float(weight) for *_, weight in given]
        elif self.lists:
            multiplicities, normaliser = [1] * len(sequences), 1.0
        elif self.weighting == "prompt":
            weights, normaliser = [1 / len(pairs)] * len(pairs), 1.0
        elif self.weighting == "lambda":
            weighted = {(better, worse): weight for better, worse, weight in lambda_weights(scores)}
            weights, normaliser = [weighted[pair] for pair in pairs], 1.0
        chosen, rejected = [better for better, _ in pairs], [worse for _, worse in pairs]
        if self.per_pair:
            listed = [index for pair in zip(chosen, rejected, strict=True) for index in pair]
            sequences, prompt_lengths = [sequences[i] for i in listed], [prompt_lengths[i] for i in listed]
            multiplicities = [1] * len(listed)
            chosen, rejected = list(range(0, len(listed), 2)), list(range(1, len(listed), 2))
        sides = {"chosen": chosen, "rejected": rejected}
        ranking = order if self.lists else []
        return Group(sequences, prompt_lengths, multiplicities, sides, weights, normaliser, ranking)

    def from_padded(self, batch: Mapping[str, torch.Tensor]) -> list[Group]:
        """The groups of a batch in TRL's padded format: sides one below the other, already cut."""
        if self.form == "labels":
            blocks = [
                _unpadded(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"], batch[f"{side}_labels"] != -100)
                for side in self.sides
            ]
        else:
            attended = batch["attention_mask"]
            scored = batch["completion_mask"] if self.form == "prompt" else attended
            members = _unpadded(batch["input_ids"], attended, scored)
            size = len(members) // len(self.sides)
            blocks = [members[first : first + size] for first in range(0, len(members), size)]
        groups = []
        for members in map(list, zip(*blocks, strict=True)):
            sides = {side: [index] for index, side in enumerate(self.sides)}
            ids, lengths = [list(ids) for ids, _ in members], [length for _, length in members]
            group = Group(ids, lengths, [1] * len(members), sides, [1.0], ranking=self._pair_ranking())
            groups.append(self._with_whole(group) if self.whole_chosen else group)
        return groups

    @staticmethod
    def _with_whole(group: Group) -> Group:
        """A term that scores more of a sequence than others do takes it as one more sequence on the same nodes."""
        whole = sorted(set(group.sides["chosen"]))
        place = {index: len(group.sequences) + number for number, index in enumerate(whole)}
        return replace(
            group,
            sequences=[*group.sequences, *(group.sequences[index] for index in whole)],
            prompt_lengths=[*group.prompt_lengths, *(0 for _ in whole)],
            multiplicities=[*group.multiplicities, *(0 for _ in whole)],
            sides={**group.sides, "chosen_whole": [place[index] for index in group.sides["chosen"]]},
        )


def _unpadded(ids: torch.Tensor, attended: torch.Tensor, scored: torch.Tensor) -> list[tuple[list[int], int]]:
    """The real tokens of each padded row, and how many of them stand before the scored ones."""
    result = []
    for row, real, counted in zip(ids.cpu(), attended.cpu().bool(), scored.cpu().bool(), strict=True):
        result.append((row[real].tolist(), int(real.sum()) - int(counted[real].sum())))
    return result
