"""What is wrong with tokenised examples, said with the row and the field, and which of them are kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset

from preftree.models.rotary import RotaryLimit
from preftree.trainers.columns import ROW
from preftree.trainers.groups import SEQUENCES, Layout, laid_out

logger = logging.getLogger(__name__)


class ExampleCheck:
    """Checks tokenised examples and says which to keep; counts what it warns about.

    Args:
        source: name of the data, for messages.
        vocabulary: token ids must be below it.
        layout: how an example is read and cut.
        row_length: an example must fit into it; None for no limit.
        overlong: what to do with an example longer than the layout's max_length or row_length: None does at max_length
            what TRL does and raises at row_length; "truncate" cuts at both, "drop" leaves out, "error" raises. An example
            whose prompt alone fills max_length has nothing left to learn from: None and "truncate" leave it out.
        share_prefixes: whether the example is one tree, or its sequences lie side by side.
        cuts: whether TRL cuts at max_length (else it leaves out).
        rotary_limit: of the model.
    """

    def __init__(
        self,
        source: str,
        vocabulary: int,
        layout: Layout,
        row_length: int | None,
        overlong: str | None,
        share_prefixes: bool = True,
        cuts: bool = True,
        rotary_limit: RotaryLimit | None = None,
    ):
        self.source = source
        self.vocabulary = vocabulary
        self.layout = layout
        self.row_length = row_length
        self.overlong = overlong
        self.share_prefixes = share_prefixes
        self.rotary_limit = rotary_limit
        self.at_max_length = overlong or ("truncate" if cuts else "drop")
        # Counted, and told by `report`.
        self.identical = 0
        self.dropped = 0
        self.without_completion = 0
        self.shortened = 0

    def __call__(self, example: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """The example, possibly with shorter responses, or None to drop it.

        Raises:
            ValueError: naming ``where`` and the field.
        """
        members = self.layout.members(example)
        if SEQUENCES in example:
            try:
                self.layout.group(example)
            except ValueError as error:
                raise ValueError(f"{where}, field 'scores': {error}") from error
        for name, (ids, prompt_length) in members.items():
            if len(ids) <= prompt_length:
                raise ValueError(f"{where}, field {name!r}: no token is left of it")
            if (highest := max(ids)) >= self.vocabulary:
                prompt = ids.index(highest) < prompt_length
                raise ValueError(
                    f"{where}, field {'prompt' if prompt else name!r}: token id {highest} is outside the model's "
                    f"vocabulary of {self.vocabulary}: does the tokenizer belong to the model?"
                )
        if len(members) > 1 and len({tuple(ids) for ids, _ in list(members.values())[:2]}) == 1:
            self.identical += 1
        max_length, longest = self.layout.max_length, max(len(ids) for ids, _ in members.values())
        if max_length is not None and longest > max_length and self.at_max_length != "truncate":
            self._refuse(where, f"{longest} tokens are more than max_length={max_length}", self.at_max_length)
            return None
        if (
            max_length is not None
            and self.layout.truncation_mode == "keep_start"
            and any(prompt_length >= max_length for _, prompt_length in members.values())
        ):
            self.without_completion += 1
            return None
        if (limit := self.rotary_limit) is not None and not limit.may_be_longer:
            kept = longest if max_length is None else min(longest, max_length)
            if kept > limit.tokens:
                raise ValueError(
                    f"{where}: with rope_type={limit.rope_type!r} what the model computes beyond {limit.tokens} tokens "
                    f"depends on what it has seen before, and this has {kept}: set max_length to {limit.tokens}"
                )
        if self.row_length is None:
            return dict(example)
        tokens = self._row_tokens(example, self.layout)
        if tokens <= self.row_length:
            return dict(example)
        if self.overlong != "truncate":
            self._refuse(where, f"its {tokens} tokens do not fit into row_length={self.row_length}", self.overlong)
            return None
        return self._shorten(example, where)

    def _row_tokens(self, example: Mapping[str, Any], layout: Layout) -> int:
        return len(laid_out(layout.group(example).tree(), self.share_prefixes, self.rotary_limit))

    def _refuse(self, where: str, why: str, overlong: str | None) -> None:
        if overlong == "drop":
            self.dropped += 1
            return
        raise ValueError(
            f"{where}: {why}: raise it, or choose what to do with such examples: overlong='drop' or overlong='truncate'"
        )

    def _shorten(self, example: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """All sequences cut to the largest common length whose tree fits."""
        members = self.layout.members(example).values()
        prompt = max(length for _, length in members)
        longest = max(len(ids) for ids, _ in members)
        low, high = prompt, min(longest, self.layout.max_length or longest)
        while low < high:  # the largest cut that fits; `low` always fits or no cut does
            middle = (low + high + 1) // 2
            cut = replace(self.layout, max_length=middle, truncation_mode="keep_start")
            if self.row_length is not None and self._row_tokens(example, cut) <= self.row_length:
                low = middle
            else:
                high = middle - 1
        if low <= prompt:
            raise ValueError(
                f"{where}, field 'prompt': its {prompt} tokens leave no room in a row of {self.row_length}"
            )
        self.shortened += 1
        return self.layout.cut(example, low)

    def report(self) -> None:
        """Warn once about what was counted."""
        told = (
            (self.identical, "chosen and rejected are equal in %d examples: they teach nothing"),
            (self.dropped, "%d examples were too long and are left out"),
            (
                self.without_completion,
                f"in %d examples the prompt alone fills max_length={self.layout.max_length}: left out",
            ),
            (self.shortened, f"%d examples were cut to fit into row_length={self.row_length} (overlong='truncate')"),
        )
        for count, message in told:
            if count:
                logger.warning("%s: " + message, self.source, count)


def check_tokenised(dataset: Dataset | IterableDataset, check: ExampleCheck) -> Dataset | IterableDataset:
    """A tokenised data set without what is to be left out, cut where that was asked for.

    Raises:
        ValueError: naming row (by the number that `check_raw` gave it) and field.
    """
    source = check.source
    if isinstance(dataset, IterableDataset):

        def marked(example: dict[str, Any], index: int) -> dict[str, Any]:
            kept = check(example, f"{source}, row {index}")
            return {**(kept or example), ROW: -1 if kept is None else index}

        return dataset.map(marked, with_indices=True).filter(lambda example: example[ROW] >= 0).remove_columns(ROW)
    kept, changed = [], {}
    columns = [ROW, "prompt", *check.layout.token_columns(dataset.column_names)]
    narrow = dataset.select_columns([name for name in columns if name in dataset.column_names])
    for index, example in enumerate(narrow):
        result = check(example, f"{source}, row {example.get(ROW, index)}")
        if result is not None:
            kept.append(index)
            if result != example:
                changed[index] = result
    check.report()
    if not kept:
        raise ValueError(
            f"{source}: no example is left to train on: all are too long (max_length={check.layout.max_length})"
        )
    if changed:
        dataset = dataset.map(lambda example, index: changed.get(index, example), with_indices=True)
    if ROW in dataset.column_names:
        dataset = dataset.remove_columns(ROW)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)
