"""Pairs of log-probabilities, and arithmetic that all objectives share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class Pairs:
    """What the objectives know of ``P`` pairs; every field ``[P]``.

    Attributes:
        chosen, rejected: the policy's summed log-probabilities (LD-DPO: weighted sums).
        chosen_lengths, rejected_lengths: completion tokens.
        ref_chosen, ref_rejected: the reference's sums, or None where the objective has no reference.
        chosen_plain: the policy's unweighted sum over the chosen completion, for the SFT term, or None.
        tokens_per_chosen: scored chosen tokens of the whole micro-batch divided by its pairs (a number), for the SFT term.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    ref_chosen: torch.Tensor | None = None
    ref_rejected: torch.Tensor | None = None
    chosen_plain: torch.Tensor | None = None
    tokens_per_chosen: float = 1.0

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """``a``; ValueError without a reference."""
        return self.chosen - self._given("ref_chosen")

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """``b``; ValueError without a reference."""
        return self.rejected - self._given("ref_rejected")

    def _given(self, name: str) -> torch.Tensor:
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs {name}, which these pairs lack: give it, or choose a loss without it")
        return value


def cut_exp(x: torch.Tensor) -> torch.Tensor:
    """``exp(x)``, the exponent cut at 80, where fp32 is still finite; the gradient is zero beyond."""
    return torch.exp(x.clamp(max=LARGEST_EXPONENT))


def cut_square(x: torch.Tensor) -> torch.Tensor:
    """``x^2``, cut at 1e36: scores of 1e34, as exponentials give them, would overflow."""
    return x.clamp(-1e18, 1e18) ** 2


def token_mean(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums as averages over tokens, that of an empty completion as 0."""
    return values / lengths.clamp(min=1)


def smoothed(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``-(1 - eps) ls(x) - eps ls(-x)``: the logistic loss of a label that is wrong with probability ``eps``."""
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)
