"""DPO and its relatives: losses of pairs that compare with a reference, named as in TRL's `DPOTrainer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from preftree.objectives.pairs import Pairs, cut_exp, cut_square, smoothed, token_mean

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class DPOOptions:
    """Options of the DPO family, named as in TRL's `DPOConfig`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5


def scores(log_ratio: torch.Tensor, options: DPOOptions) -> torch.Tensor:
    """``f(log-ratio)`` of f-DPO (Wang et al., arXiv 2309.16240), ``f'`` of the divergence up to constants.

    reverse_kl: ``x``; forward_kl: ``1 - exp(-x)``; js_divergence: ``log 2 + ls(x)``; alpha_divergence:
    ``(exp((alpha - 1) x) - 1) / (alpha - 1)``. Exponents are cut at 80 (TRL cuts alpha_divergence's only).
    """
    kind, alpha = options.f_divergence_type, options.f_alpha_divergence_coef
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return log_ratio
    if kind == "forward_kl":
        return 1 - cut_exp(-log_ratio)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    if kind == "alpha_divergence":
        return (cut_exp((alpha - 1) * log_ratio) - 1) / (alpha - 1)
    raise ValueError(f"unknown f_divergence_type {kind!r}: choose from {', '.join(DIVERGENCES)}")


def _delta(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    return scores(pairs.chosen_ratio, options) - scores(pairs.rejected_ratio, options)


def _delta_per_token(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    chosen = token_mean(scores(pairs.chosen_ratio, options), pairs.chosen_lengths)
    return chosen - token_mean(scores(pairs.rejected_ratio, options), pairs.rejected_lengths)


def sigmoid(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """DPO: ``-ls(beta D)`` (Rafailov et al., arXiv 2305.18290, eq. 7). As in TRL, without label smoothing."""
    return -F.logsigmoid(options.beta * _delta(pairs, options))


def hinge(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """SLiC's hinge on DPO's margin: ``max(0, 1 - beta D)`` (Liu et al., RSO, arXiv 2309.06657)."""
    return torch.relu(1 - options.beta * _delta(pairs, options))


def ipo(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """IPO: ``(S_c / |c| - S_r / |r| - 1 / (2 beta))^2`` (Azar et al., arXiv 2310.12036, eq. 17, beta its tau).

    Scores are averaged over completion tokens, as TRL does; the paper sums.
    """
    return cut_square(_delta_per_token(pairs, options) - 1 / (2 * options.beta))


def exo_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """EXO for a pair: ``KL(s(beta D) || 1 - eps)`` of two outcomes (Ji et al., arXiv 2402.00856, eq. 16)."""
    logits, epsilon = options.beta * _delta(pairs, options), options.label_smoothing
    win = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-epsilon))
    return win + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(epsilon))


def nca_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """NCA for a pair: ``-ls(beta a) - ls(-beta a) / 2 - ls(-beta b) / 2`` (Chen et al., arXiv 2402.05369)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """Robust DPO: ``((1 - eps) -ls(beta D) - eps -ls(-beta D)) / (1 - 2 eps)`` (Chowdhury et al., arXiv 2403.00409)."""
    logits, epsilon = options.beta * _delta(pairs, options), options.label_smoothing
    return (-(1 - epsilon) * F.logsigmoid(logits) + epsilon * F.logsigmoid(-logits)) / (1 - 2 * epsilon)


def bco_pair(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """BCO on pairs: ``-ls(beta a) - ls(-beta b)`` (Jung et al., arXiv 2404.04656), as in TRL without running mean."""
    return -F.logsigmoid(options.beta * pairs.chosen_ratio) - F.logsigmoid(-options.beta * pairs.rejected_ratio)


def sppo_hard(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """SPPO, hard labels: ``(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2`` (Wu et al., arXiv 2405.00675, eq. 4.7)."""
    return (pairs.chosen_ratio - 0.5 / options.beta) ** 2 + (pairs.rejected_ratio + 0.5 / options.beta) ** 2


def aot(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """AOT on paired data: DPO on the sorted margins of the micro-batch (Melnyk et al., arXiv 2406.05882)."""
    margins = (pairs.chosen - pairs.rejected).sort().values
    ref_margins = (pairs._given("ref_chosen") - pairs._given("ref_rejected")).sort().values
    return smoothed(options.beta * (margins - ref_margins), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """AOT on unpaired data: DPO on the sorted log-ratios of the micro-batch (Melnyk et al., arXiv 2406.05882)."""
    difference = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return smoothed(options.beta * difference, options.label_smoothing)


def apo_zero(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """APO-zero: ``1 - s(beta a) + s(beta b)`` (D'Oosterlinck et al., arXiv 2408.06266, eq. 7)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """APO-down: ``s(beta a) + 1 - s(beta (a - b))`` (D'Oosterlinck et al., arXiv 2408.06266, eq. 8)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """DiscoPOP: ``-ls(z) (1 - m) + exp(-z) m``, ``z = beta D``, ``m = s(z / tau)`` (Lu et al., arXiv 2406.08414, eq. 5)."""
    logits = options.beta * _delta(pairs, options)
    blend = logits / options.discopop_tau
    # exp(-z) overflows where m vanishes: their product is one exponential.
    return -F.logsigmoid(logits) * torch.sigmoid(-blend) + cut_exp(F.logsigmoid(blend) - logits)


def sft(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """Negative log-likelihood of the chosen completions, a mean over all chosen tokens of the micro-batch.

    Each pair's share is scaled so that the mean over the micro-batch's pairs is that token mean; WPO's weights (which
    TRL cannot combine with it) multiply these shares. ValueError without ``chosen_plain``.
    """
    return -pairs._given("chosen_plain") / pairs.tokens_per_chosen


def sigmoid_norm(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """DPO on per-token scores: ``-ls(beta (S_c / |c| - S_r / |r|))``."""
    return -F.logsigmoid(options.beta * _delta_per_token(pairs, options))


DPO_LOSSES: dict[str, Callable[[Pairs, DPOOptions], torch.Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
    )
}


# These mix the pairs of a micro-batch: the loss of one pair depends on all of them.
MIXING = frozenset({"aot", "aot_unpaired"})


# Which of `DPO_LOSSES` an option changes; with the others it has no effect (TRL refuses f-divergences there, sft excepted).
OPTION_READERS: dict[str, frozenset[str]] = {
    "label_smoothing": frozenset({"exo_pair", "robust", "aot", "aot_unpaired"}),
    "discopop_tau": frozenset({"discopop"}),
    "f_divergence_type": frozenset({"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"}),
}
