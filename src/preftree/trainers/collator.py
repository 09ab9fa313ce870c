"""Tokenised examples to packed rows: what a worker process prepares for a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from preftree.models.rotary import RotaryLimit
from preftree.packing import MANY_LENGTHS, PackedRow, empty_row, pack, static_length
from preftree.trainers.groups import RANKED_REFERENCE, SEQUENCES, Group, Layout, laid_out
from preftree.trainers.vision import ImageReader, holds_images, place_of
from preftree.transfer import send
from preftree.tree import TokenTree

# Examples whose prompts differ are merged into one tree if they start with so many equal tokens: sharing fewer saves
# less than the blocks of attention that it makes partial.
SHARED_START = 128


@dataclass
class TreeCollator:
    """Collates tokenised examples into packed rows; examples with the same prompt share one tree.

    Args:
        pad_token_id: token of the rows' padding.
        layout: how an example is read.
        row_length: most tokens of a row; a batch's rows are as short as their number allows (`pack`). None puts the batch
            into one row.
        grows: rows are longer than that where a tree is.
        static: round a row without a given length up to one of a few lengths, for compiled kernels.
        lengths: how many lengths rows have to each doubling (`static_length`).
        share_prefixes: False lays every sequence out by itself (packed, but nothing shared): the baseline.
        rotary_limit: of the model: sequences on either side of it share nothing.
        columns: numbers of an example to hand on, fp32 ``[examples]`` each, where the data have them.
        reference_columns: where an example keeps its sequences' reference log-probabilities, one column a sequence. (A
            ranked example has a list of them in one column.)
        reader: how an example with images is read; None if none may have some.
        padded: a collator of TRL's format whose batch to add under "padded", for what needs logits of whole sequences.

    A batch holds

    - ``rows``, and for each of them in ``members`` what its units are: for every side the place of the unit's sequence
      among the row's sequences, under "unit" the units' numbers in the batch, under "ranking" and "sizes" the ranked
      lists, all LongTensors;
    - ``index`` (LongTensor ``[examples]``), ``group_sizes`` (how many sequences each example has),
      ``weights`` (fp32 ``[units]``; with them the batch's loss is the sum over its units), ``normaliser`` (what they have
      been divided by), ``lists`` (how many);
    - ``ranked`` (whether the examples are ranked completions);
    - ``tokens`` (scored tokens of each side, over all units) and ``num_tokens`` (of all sequences, prompts included);
    - ``reference`` (fp32 ``[sequences]``) and the columns, where the data have them.
    """

    pad_token_id: int
    layout: Layout = field(default_factory=Layout)
    row_length: int | None = None
    grows: bool = False
    static: bool = False
    lengths: int = MANY_LENGTHS
    share_prefixes: bool = True
    rotary_limit: RotaryLimit | None = None
    columns: tuple[str, ...] = ()
    reference_columns: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps")
    reader: ImageReader | None = None
    padded: Callable[[list[Any]], Any] | None = None

    def group(self, example: Mapping[str, Any]) -> Group:
        """The sequences of an example, tokenised or with images."""
        if self.reader is None or not holds_images(example):
            return self.layout.group(example)
        group = self.reader(example)
        if self.row_length is not None and not self.grows:
            tree = group.tree()
            tokens = len(laid_out(tree, self.share_prefixes, self.rotary_limit))
            if tokens > self.row_length:
                raise ValueError(
                    f"{place_of(example)}: its {tokens} tokens do not fit into row_length={self.row_length}: raise it"
                )
        return group

    def content(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """Lists of numbers that all which is computed from an example depends on: its tokens, and its images."""
        if self.reader is None or not holds_images(example):
            return example
        group = self.reader(example)
        content: dict[str, Any] = {"sequences": group.sequences, "prompt_lengths": group.prompt_lengths}
        if group.images is not None:
            content["images"] = list(group.images.digest)
        return content

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:  # of a step with fewer examples than ranks
            return TreeBatch(self._nothing())
        batch = self.collate([self.group(example) for example in examples])
        batch["ranked"] = SEQUENCES in examples[0]
        for column in self.columns:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        reference = (RANKED_REFERENCE,) if batch["ranked"] else self.reference_columns
        if reference and reference[0] in examples[0]:
            values = [value for example in examples for value in _flat(example[name] for name in reference)]
            batch["reference"] = torch.tensor(values, dtype=torch.float32)
        if self.padded is not None:
            batch["padded"] = self.padded([dict(example) for example in examples])
        return TreeBatch(batch)

    def _nothing(self) -> dict[str, Any]:
        """A batch without examples: one row of padding, which takes part in what ranks do together."""
        row = empty_row(static_length(1, self.lengths), self.pad_token_id)
        none = {name: torch.zeros(0, dtype=torch.long) for name in (*self.layout.sides, "unit", "ranking", "sizes")}
        return {
            "index": torch.zeros(0, dtype=torch.long),
            "group_sizes": [],
            "weights": torch.zeros(0),
            "normaliser": 0.0,
            "lists": 0,
            "num_tokens": 0,
            "tokens": dict.fromkeys(self.layout.sides, 0),
            "rows": [row],
            "members": [none],
            "ranked": False,
            "reference": torch.zeros(0),
            **{column: torch.zeros(0) for column in self.columns},
        }

    def from_padded(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The same batch from TRL's padded format, as a collator of the user's gives it."""
        result = self.collate(self.layout.from_padded(batch)) | {"ranked": False}
        result.update({column: batch[column] for column in self.columns if column in batch})
        if self.reference_columns and all(column in batch for column in self.reference_columns):
            result["reference"] = torch.stack([batch[column] for column in self.reference_columns], dim=1).flatten()
        if self.padded is not None:
            result["padded"] = batch
        return TreeBatch(result)

    def collate(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Rows of the groups of a batch; a group is never split over two rows."""
        sizes = [len(group.sequences) for group in groups]
        normaliser = sum(group.normaliser for group in groups)
        batch: dict[str, Any] = {
            "index": torch.arange(len(groups)),
            "group_sizes": sizes,
            "weights": torch.tensor([weight / normaliser for group in groups for weight in group.weights]),
            "normaliser": normaliser,
            "lists": sum(bool(group.ranking) for group in groups),
            "num_tokens": sum(group.num_tokens for group in groups),
            "tokens": {side: sum(_scored(group, side) for group in groups) for side in groups[0].sides},
        }
        first_sequence = [sum(sizes[:index]) for index in range(len(groups))]
        own_trees = [group.tree() for group in groups]
        clusters = [[index] for index in range(len(groups))]
        if self.share_prefixes:
            clusters = _clusters(groups, [len(tree) for tree in own_trees], self.row_length)
        trees, sequence_ids = [], []
        for cluster in clusters:
            tree = own_trees[cluster[0]] if len(cluster) == 1 else _merged([groups[index] for index in cluster])
            trees.append(laid_out(tree, self.share_prefixes, self.rotary_limit))
            sequence_ids += [first_sequence[index] + k for index in cluster for k in range(sizes[index])]
        row_length = self.row_length
        if row_length is None and self.static:
            row_length = static_length(sum(len(tree) for tree in trees), self.lengths)
        elif row_length is not None and self.grows:
            row_length = max(row_length, static_length(max(len(tree) for tree in trees), self.lengths))
        rows = pack(trees, row_length, self.pad_token_id, self.lengths)
        for row in rows:
            row.sequence_ids = torch.tensor([sequence_ids[index] for index in row.sequence_ids.tolist()])
        return batch | {"rows": rows, "members": [_members(row, groups, first_sequence) for row in rows]}


def _flat(values: Iterable[Any]) -> list[float]:
    """Numbers, or lists of numbers, as one list."""
    return [number for value in values for number in (value if isinstance(value, list) else [value])]


def _scored(group: Group, side: str) -> int:
    """Tokens of a side, over its units, that have a prediction and are not the prompt's."""
    return sum(len(group.sequences[index]) - max(group.prompt_lengths[index], 1) for index in group.sides[side])


def _members(row: PackedRow, groups: Sequence[Group], first_sequence: Sequence[int]) -> dict[str, torch.Tensor]:
    """Places in the row of the sequences of its units, and the units' numbers (see `TreeCollator`)."""
    place = {sequence: index for index, sequence in enumerate(row.sequence_ids.tolist())}
    members: dict[str, list[int]] = {side: [] for side in groups[0].sides}
    members |= {"unit": [], "ranking": [], "sizes": []}
    unit = 0
    for group, first in zip(groups, first_sequence, strict=True):
        if first in place:
            for side, indices in group.sides.items():
                members[side] += [place[first + index] for index in indices]
            members["unit"] += range(unit, unit + group.units)
            if group.ranking:
                members["ranking"] += [place[first + index] for index in group.ranking]
                members["sizes"].append(len(group.ranking))
        unit += group.units
    return {name: torch.tensor(values, dtype=torch.long) for name, values in members.items()}


def _merged(groups: Sequence[Group]) -> TokenTree:
    """One tree of the sequences of several groups, in order."""
    return TokenTree.from_sequences(
        [ids for group in groups for ids in group.sequences],
        [length for group in groups for length in group.prompt_lengths],
        [count for group in groups for count in group.multiplicities],
        groups[0].images,
    )


class TreeBatch(dict[str, Any]):
    """A collated batch, which goes to a device as a whole: accelerate's data loader asks it to."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TreeBatch:
        """The same batch with its tensors and rows on ``device``, which is not waited for."""
        leaves: list[torch.Tensor] = []
        _map_tensors(self, leaves.append)
        sent = iter(send(leaves, device))
        return TreeBatch(_map_tensors(self, lambda tensor: next(sent)))


def _map_tensors(given: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The same structure with a function's values in place of its tensors, called in a fixed order."""
    if isinstance(given, torch.Tensor):
        return function(given)
    if isinstance(given, PackedRow):
        return given.with_tensors(function(tensor) for tensor in given.tensors)
    if isinstance(given, Mapping):
        return {name: _map_tensors(value, function) for name, value in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(_map_tensors(value, function) for value in given)
    return given


def _clusters(groups: Sequence[Group], sizes: Sequence[int], row_length: int | None) -> list[list[int]]:
    """`_cluster` among groups with the same images."""
    alike: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(group.begins_with, []).append(index)
    clusters = []
    for members in alike.values():
        found = _cluster([groups[index] for index in members], [sizes[index] for index in members], row_length)
        clusters += [[members[index] for index in cluster] for cluster in found]
    return sorted(clusters)


def _cluster(groups: Sequence[Group], sizes: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Which groups to merge into one tree: those of the same prompt, of a prompt that begins another one, or that have
    a long start in common. A tree is kept short enough for a row."""
    shared = [_common_start(group.sequences) for group in groups]
    prompts = [min(*group.prompt_lengths, start) or start for group, start in zip(groups, shared, strict=True)]
    order = sorted(range(len(groups)), key=lambda index: (groups[index].sequences[0][: prompts[index]], index))
    clusters: list[list[int]] = []
    total = 0
    for index in order:
        if clusters:
            last = clusters[-1][-1]
            start = _common_start([groups[last].sequences[0], groups[index].sequences[0]])
            start = min(start, shared[last], shared[index])
            worth_it = start >= SHARED_START or 0 < min(prompts[last], prompts[index]) <= start
            if worth_it and (row_length is None or total + sizes[index] - start <= row_length):
                clusters[-1].append(index)
                total += sizes[index] - start
                continue
        clusters.append([index])
        total = sizes[index]
    return sorted(sorted(cluster) for cluster in clusters)


def _common_start(sequences: Sequence[list[int]]) -> int:
    """How many tokens all of the sequences start with in common."""
    low, high = min(sequences), max(sequences)  # what the first and last in order share, all share
    return next(
        (index for index, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high))
    )
