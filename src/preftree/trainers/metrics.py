"""What is logged of a micro-batch, from its whole record: no metric depends on how the batch was cut into rows.

A rank keeps what it adds to each metric; ranks exchange these numbers, and wait for their devices, when something is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from preftree.trainers.step import MicroBatch


@dataclass(frozen=True)
class Metric:
    """A number about the examples of all ranks.

    Attributes:
        parts: ``[k]``, what this rank adds.
        of_all: the number, by the parts of all ranks, float64 ``[ranks, k]``; None if there is nothing that it is about.
    """

    parts: torch.Tensor
    of_all: Callable[[torch.Tensor], float | None]


Metrics = dict[str, Metric]


def ratio(total: torch.Tensor, count: torch.Tensor) -> Metric:
    """What totals of all ranks are of their counts; zero where there is nothing."""
    return Metric(torch.stack([total, count]), lambda parts_R2: _ratio(parts_R2) or 0.0)


def ratio_if_any(total: torch.Tensor, count: torch.Tensor) -> Metric:
    """The same, left out where there is nothing."""
    return Metric(torch.stack([total, count]), _ratio)


def difference_if_any(one: Metric, other: Metric) -> Metric:
    """Of two ratios, left out where there is nothing of one of them."""

    def of_all(parts_R4: torch.Tensor) -> float | None:
        first, second = _ratio(parts_R4[:, :2]), _ratio(parts_R4[:, 2:])
        return None if first is None or second is None else first - second

    return Metric(torch.cat([one.parts, other.parts]), of_all)


def _ratio(parts_R2: torch.Tensor) -> float | None:
    total, count = parts_R2.sum(0).tolist()
    return total / count if count else None


def mean(values: torch.Tensor) -> Metric:
    """Mean over the values ``[n]`` of all ranks."""
    total = values.float().sum()
    return ratio(total, torch.full_like(total, values.numel()))


def mean_of_ranks(value: torch.Tensor) -> Metric:
    """Mean of what each rank has found, ``[]``."""
    return ratio(value.float(), torch.ones_like(value, dtype=torch.float32))


def smallest(values: torch.Tensor) -> Metric:
    """The smallest of all ranks' values ``[n]``."""
    own = torch.cat([values.float(), values.new_full((1,), torch.inf, dtype=torch.float32)]).min()
    return Metric(own[None], lambda parts_R1: parts_R1.min().item())


def largest(values: torch.Tensor) -> Metric:
    """The largest of all ranks' values ``[n]``."""
    own = torch.cat([values.float(), values.new_full((1,), -torch.inf, dtype=torch.float32)]).max()
    return Metric(own[None], lambda parts_R1: parts_R1.max().item())


def pair_metrics(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
) -> Metrics:
    """TRL's metrics of pairs, each a mean over the pairs of all ranks; arguments are ``[pairs]``."""
    by_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return {name: mean(values) for name, values in by_pair.items()}


def logit_metrics(batch: MicroBatch, sides: Sequence[str] = ("chosen", "rejected")) -> Metrics:
    """``logits/<side>``: mean over the side's completion tokens, of all ranks, of the mean logit over the vocabulary."""
    return {f"logits/{side}": token_mean(batch, side, "mean_logits") for side in sides}


def entropy(batch: MicroBatch, sides: Sequence[str] = ("chosen", "rejected")) -> Metric:
    """Mean entropy, in nats, over the completion tokens of the sides, over all ranks."""
    sums = [(batch.side(side, "entropy").sum(), batch.side(side, "tokens").sum()) for side in sides]
    return ratio(*(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)))


def token_mean(batch: MicroBatch, side: str, name: str) -> Metric:
    """Mean over a side's completion tokens, over all ranks."""
    return ratio(batch.side(side, name).sum(), batch.side(side, "tokens").sum())


class Unread(NamedTuple):
    """A micro-batch's metrics that nobody has asked for yet.

    Attributes:
        metrics: what they are, by name.
        parts: fp32, those of all of them behind each other.
    """

    metrics: dict[str, tuple[int, Callable[[torch.Tensor], float | None]]]
    parts: torch.Tensor

    @classmethod
    def of(cls, metrics: Metrics) -> Unread:
        """To be kept: as one tensor."""
        parts = torch.cat([metric.parts.detach().float() for metric in metrics.values()])
        return cls({name: (metric.parts.numel(), metric.of_all) for name, metric in metrics.items()}, parts)


def read(unread: Sequence[Unread], gather: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, float]]:
    """The numbers by name, of several micro-batches: ranks exchange what they have, and the device is waited for, once.

    Args:
        gather: collects tensors of all ranks, which have as many micro-batches, along their first dimension.
    """
    if not unread:
        return []
    parts_RK = gather(torch.cat([each.parts for each in unread])[None]).cpu().double()
    result: list[dict[str, float]] = []
    first = 0
    for each in unread:
        result.append({})
        for name, (size, of_all) in each.metrics.items():
            if (value := of_all(parts_RK[:, first : first + size])) is not None:
                result[-1][name] = value
            first += size
    return result
