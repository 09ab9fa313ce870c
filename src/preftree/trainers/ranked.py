"""Ranked data (`prompt`, `completions`, `scores` or `ranks`) through TRL's tokenisation of pairs, and back together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from preftree.trainers.checks import pair_weights_of, scores_of
from preftree.trainers.columns import ROW, columns_of
from preftree.trainers.groups import PAIR_WEIGHTS, PROMPT_LENGTHS, SCORES, SEQUENCES, Layout

# Of the example that a pair is a part of: how many completions it has, their scores, the user's own pairs.
_COUNT, _ORDER, _WEIGHTS = "preftree_count", "preftree_scores", "preftree_weights"


def flatten(dataset: Dataset | IterableDataset, ties: str) -> Dataset | IterableDataset:
    """Two completions to a row, as `chosen` and `rejected`: for tokenisation only. The last one may stand in it twice."""

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[dict[str, Any]] = []
        for values in zip(*batch.values(), strict=True):
            example = dict(zip(batch, values, strict=True))
            completions, scores = example["completions"], scores_of(example, "ranked data", ties)
            weights = pair_weights_of(example, "ranked data", scores)
            for name in ("completions", "scores", "ranks", PAIR_WEIGHTS):
                example.pop(name, None)
            for index in range(0, len(completions), 2):
                two = {"chosen": completions[index], "rejected": completions[min(index + 1, len(completions) - 1)]}
                own = {} if weights is None else {_WEIGHTS: weights}
                rows.append({**example, **two, **own, _COUNT: len(completions), _ORDER: scores})
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}

    return dataset.map(pairs, batched=True, remove_columns=columns_of(dataset))


def regroup(dataset: Dataset | IterableDataset, layout: Layout) -> Dataset | IterableDataset:
    """What `flatten` took apart, tokenised since, as one row an example: `sequences`, `prompt_lengths`, `scores`."""
    kind = Dataset if isinstance(dataset, Dataset) else IterableDataset
    return kind.from_generator(_examples, gen_kwargs={"rows": dataset, "layout": layout})


def _examples(rows: Iterable[Mapping[str, Any]], layout: Layout) -> Iterator[dict[str, Any]]:
    members: list[tuple[list[int], int]] = []
    for row in rows:
        members += layout.members(row).values()
        if len(members) < row[_COUNT]:
            continue
        members = members[: row[_COUNT]]
        lengths = [length for _, length in members]
        if layout.form == "prompt":
            # TRL cuts a prompt where it and a completion merge into other tokens; here all have the shortest one.
            lengths = [min(lengths)] * len(lengths)
        example = {SEQUENCES: [ids for ids, _ in members], PROMPT_LENGTHS: lengths, SCORES: list(row[_ORDER])}
        if row.get(_WEIGHTS) is not None:
            example[PAIR_WEIGHTS] = row[_WEIGHTS]
        if ROW in row:
            example[ROW] = row[ROW]
        yield example
        members = []
