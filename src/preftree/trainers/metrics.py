"""What is logged of a micro-batch, from its whole record: no metric depends on how the batch was cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from preftree.trainers.step import MicroBatch

Gather = Callable[[torch.Tensor], torch.Tensor]
# Numbers by name, those of the device still on it (see `Unread`).
Metrics = dict[str, torch.Tensor | float]


def pair_metrics(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    gather: Gather,
) -> Metrics:
    """TRL's metrics of pairs, each a mean over the pairs of all ranks; arguments are ``[pairs]``.

    Args:
        gather: collects tensors of all ranks along their first dimension.
    """
    by_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return {name: mean(values, gather) for name, values in by_pair.items()}


@dataclass(frozen=True)
class Unread:
    """Metrics whose numbers are on the device yet: reading them waits for all that it has been told to do.

    Attributes:
        names: in their order.
        known: those that are no tensors.
        numbers: fp32, the others, in the order of names; None if there are none.
    """

    names: tuple[str, ...]
    known: dict[str, float]
    numbers: torch.Tensor | None

    @classmethod
    def of(cls, metrics: Metrics) -> Unread:
        """As one tensor, so that the device is waited for once."""
        tensors = [value.detach().float() for value in metrics.values() if isinstance(value, torch.Tensor)]
        known = {name: float(value) for name, value in metrics.items() if not isinstance(value, torch.Tensor)}
        return cls(tuple(metrics), known, torch.stack(tensors) if tensors else None)

    def read(self) -> dict[str, float]:
        """The numbers by name."""
        numbers = iter(self.numbers.tolist() if self.numbers is not None else [])
        return {name: self.known[name] if name in self.known else next(numbers) for name in self.names}


def as_floats(metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers."""
    return Unread.of(metrics).read()


def gather_uneven(gather: Gather, counts: Sequence[int] | None, values: torch.Tensor) -> torch.Tensor:
    """Values of all ranks, of which each has so many; None if all have as many."""
    if counts is None:
        return gather(values)
    padded = torch.nn.functional.pad(values, (0, max(counts) - len(values)))
    return torch.cat([own[:count] for own, count in zip(gather(padded).chunk(len(counts)), counts, strict=True)])


def mean(values: torch.Tensor, gather: Gather) -> torch.Tensor:
    """Mean over the values of all ranks."""
    return gather(values.flatten()).mean()


def logit_metrics(batch: MicroBatch, gather: Gather, sides: Sequence[str] = ("chosen", "rejected")) -> Metrics:
    """``logits/<side>``: mean over the side's completion tokens, of all ranks, of the mean logit over the vocabulary."""
    return {f"logits/{side}": token_mean(batch, side, "mean_logits", gather) for side in sides}


def entropy(batch: MicroBatch, gather: Gather, sides: Sequence[str] = ("chosen", "rejected")) -> torch.Tensor:
    """Mean entropy, in nats, over the completion tokens of the sides, over all ranks."""
    sums = torch.stack([_sums(batch, side, "entropy") for side in sides]).sum(0)
    return _ratio(gather(sums[None]).sum(0))


def token_mean(batch: MicroBatch, side: str, name: str, gather: Gather) -> torch.Tensor:
    """Mean over a side's completion tokens, over all ranks."""
    return _ratio(gather(_sums(batch, side, name)[None]).sum(0))


def _sums(batch: MicroBatch, side: str, name: str) -> torch.Tensor:
    """``[2]``: what was recorded under ``name``, and the tokens it was summed over."""
    return torch.stack([batch.side(side, name).sum(), batch.side(side, "tokens").sum()])


def _ratio(total_and_count: torch.Tensor) -> torch.Tensor:
    """Total over count, zero where there is nothing."""
    total, count = total_and_count
    return torch.where(count > 0, total / count, torch.zeros_like(total))
