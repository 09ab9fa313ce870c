"""Losses of single answers, good or bad: KTO, and APO-zero on unpaired data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KTOOptions:
    """Options of the losses on unpaired examples, named as in TRL's `KTOConfig`."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kl_estimate(ratios: torch.Tensor) -> torch.Tensor:
    """KTO's reference point ``z0``: ``max(0, mean of log-ratios)`` (Ethayarajh et al., arXiv 2402.01306, sec. 4.1).

    Args:
        ratios: ``[U]``, log-ratios of mismatched completions, those of other prompts. Over ranks, gather them before.

    Returns:
        A scalar without gradient.

    Raises:
        ValueError: there is no ratio.
    """
    if not ratios.numel():
        raise ValueError("the KL estimate of KTO needs at least one mismatched completion")
    return ratios.detach().mean().clamp(min=0)


def kto(ratio: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, options: KTOOptions) -> torch.Tensor:
    """KTO: ``w (1 - s(beta (x - z0)))`` of a desirable example, ``w (1 - s(beta (z0 - x)))`` of another.

    (Ethayarajh et al., arXiv 2402.01306, sec. 4.1, eq. 7, up to a constant.)

    Args:
        ratio: ``[U]``, log-ratios ``x``.
        desirable: BoolTensor ``[U]``.
        kl: scalar ``z0``, see `kl_estimate`.

    Returns:
        ``[U]``.
    """
    # Numbers in the dtype of the ratios: torch.where would make them fp32.
    good, bad = ratio.new_tensor(options.desirable_weight), ratio.new_tensor(options.undesirable_weight)
    x = options.beta * (ratio - kl)
    return torch.where(desirable, good, bad) * torch.sigmoid(torch.where(desirable, -x, x))


def apo_zero_unpaired(
    ratio: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, options: KTOOptions
) -> torch.Tensor:
    """APO-zero's two terms on unpaired examples: `kto` with ``z0 = 0``, ``kl`` unused.

    (After D'Oosterlinck et al., arXiv 2408.06266, eq. 7. Weights are KTO's.)
    """
    return kto(ratio, desirable, torch.zeros_like(kl), options)


KTO_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, KTOOptions], torch.Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}
