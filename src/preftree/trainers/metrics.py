"""What is logged of a micro-batch, from its whole record: no metric depends on how the batch was cut into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from preftree.trainers.step import MicroBatch

Gather = Callable[[torch.Tensor], torch.Tensor]
# Numbers by name, those of the device still on it (see `as_floats`).
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


def as_floats(metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers, all of them read from the device at once: it is waited for once."""
    tensors = {name: value.float() for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    numbers = torch.stack(list(tensors.values())).tolist() if tensors else []
    read = dict(zip(tensors, numbers, strict=True))
    return {name: read[name] if name in read else float(value) for name, value in metrics.items()}


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
