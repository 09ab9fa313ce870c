"""Sharing out a step's examples over ranks by what they cost, so that no rank waits for another one.

The examples of a step are those that one process with a batch as large as all ranks' together would take, in the sampler's
order: which rank computes what changes nothing of the step. Nothing is repeated where the last step has too few.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import PreTrainedConfig

from preftree.plan import ModelCost
from preftree.trainers.groups import Layout


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Which examples each rank takes, by number, so that the largest sum of costs is small.

    The costliest first, each to the rank that has least (Graham 1969, "Bounds on multiprocessing timing anomalies": at most
    4/3 of the best). Ranks have one example at least, if there are as many.
    """
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    taken: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, count, rank = loads[0]
        taken[rank].append(number)
        heapq.heapreplace(loads, (load + costs[number], count + 1, rank))
    return [sorted(numbers) for numbers in taken]


def imbalance(loads: Sequence[float]) -> float:
    """Share of its time that the mean rank waits for the one that has most to do."""
    most = max(loads)
    return 1 - sum(loads) / len(loads) / most if most > 0 else 0.0


class BalancedBatches(Sampler[list[int]]):
    """One rank's batches: of each step's examples those that `assign` gives it, none where there are fewer than ranks.

    Args:
        sampler: gives examples in the same order on every rank.
        batch_size: examples of a step for each rank, in the mean.
        ranks, rank: how many there are, and which one this is.
        costs: of each example of the data; None for equal ones.
        drop_last: leave out a last step with fewer examples.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        ranks: int,
        rank: int,
        costs: np.ndarray | None = None,
        drop_last: bool = False,
    ):
        self.steps = BatchSampler(sampler, batch_size * ranks, drop_last)
        self.ranks, self.rank, self.costs = ranks, rank, costs

    @property
    def sampler(self) -> Sampler[int] | Iterable[int]:
        return self.steps.sampler

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for examples in self.steps:
            costs = [1.0] * len(examples) if self.costs is None else self.costs[examples].tolist()
            yield [examples[number] for number in assign(costs, self.ranks)[self.rank]]


def share_out(loader: DataLoader, costs: np.ndarray | None) -> bool:
    """Let a loader of accelerate's, which gives each rank every n-th batch, give it a share of each step's examples.

    Returns:
        Whether it does: streamed data, batches that are split, and samplers of whole batches are left as they are.
    """
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard) or shard.split_batches or type(shard.batch_sampler) is not BatchSampler:
        return False
    batches = shard.batch_sampler
    shard.batch_sampler = BalancedBatches(
        batches.sampler, batches.batch_size, shard.num_processes, shard.process_index, costs, batches.drop_last
    )
    # What it gives is this rank's own: passed on as it is, of whatever length.
    shard.num_processes, shard.process_index, shard.batch_size, shard.even_batches = 1, 0, None, False
    return True


def costs_of(dataset: object, layout: Layout, config: PreTrainedConfig) -> np.ndarray | None:
    """Operations of each example as a tree that shares the prompt, where the data say what that is; None for data that are
    not tokenised, and for ranked ones."""
    prompt, *sides = (f"{name}_{'input_' * (layout.form == 'labels')}ids" for name in ("prompt", *layout.sides))
    needed = {prompt, *sides} if layout.form == "prompt" else set(sides)
    if not isinstance(dataset, Dataset) or not needed <= set(dataset.column_names):
        return None
    try:
        cost = ModelCost.from_config(config)
    except Exception:  # a class that cannot be made of its configuration alone: by tokens
        cost = ModelCost(1.0, 0.0, 0.0)
    limit = np.inf if layout.max_length is None else layout.max_length
    whole = [_lengths(dataset, side) for side in sides]
    prompts = _lengths(dataset, prompt) if prompt in dataset.column_names else np.zeros_like(whole[0])
    if layout.form != "prompt":  # the prompt stands in each sequence
        whole = [np.maximum(lengths - prompts, 0.0) for lengths in whole]
    prompts = np.minimum(prompts, limit)
    responses = [np.minimum(lengths, limit - prompts) for lengths in whole]
    return cost.of_prompts(prompts, np.stack(responses, axis=1))


def _lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Of a column's lists, which are not read for it."""
    import pyarrow.compute as compute

    whole = compute.list_value_length(dataset.data.column(column)).to_numpy().astype(float)
    indices = dataset._indices
    return whole if indices is None else whole[indices.column(0).to_numpy()]
