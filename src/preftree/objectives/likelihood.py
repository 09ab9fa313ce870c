"""Losses of pairs without a reference: CPO, SimPO, AlphaPO, TPO and ORPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from preftree.objectives.pairs import LARGEST_EXPONENT, Pairs, cut_square, smoothed, token_mean


@dataclass(frozen=True)
class LikelihoodOptions:
    """Options of the objectives without a reference (CPO, SimPO, AlphaPO, TPO); defaults are those of TRL's `CPOConfig`.

    Attributes:
        gamma: target margin of SimPO and TPO-L, TRL's ``simpo_gamma`` and ``tpo_l_gamma``.
        alpha: AlphaPO's exponent, see `implicit_rewards`; 0 leaves log-probabilities as they are.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    alpha: float = 0.0


def implicit_rewards(pairs: Pairs, per_token: bool, options: LikelihoodOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards ``C``, ``R`` of chosen and rejected completions, not yet times beta.

    They are log-probabilities ``log p``, summed, or averaged over tokens (a completion without tokens: 0); with ``alpha``,
    ``(1 - p^-alpha) / alpha`` of these (Gupta et al., AlphaPO, arXiv 2501.03884; the paper averages always), its exponent
    cut at 80.
    """

    def reward(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        value = token_mean(logps, lengths) if per_token else logps
        if options.alpha == 0:
            return value
        return -torch.expm1((-options.alpha * value).clamp(max=LARGEST_EXPONENT)) / options.alpha

    return reward(pairs.chosen, pairs.chosen_lengths), reward(pairs.rejected, pairs.rejected_lengths)


def _reward_margin(pairs: Pairs, per_token: bool, options: LikelihoodOptions) -> torch.Tensor:
    chosen, rejected = implicit_rewards(pairs, per_token, options)
    return chosen - rejected


def cpo_sigmoid(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """CPO: ``-(1 - eps) ls(beta (C - R)) - eps ls(-beta (C - R))``, summed (Xu et al., arXiv 2401.08417, eq. 3).

    Also TPO's preference term (Saeidi et al., arXiv 2405.16681). The papers have no smoothing.
    """
    return smoothed(options.beta * _reward_margin(pairs, False, options), options.label_smoothing)


def cpo_hinge(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """SLiC: ``max(0, 1 - beta (C - R))``, summed (Zhao et al., arXiv 2305.10425, rank calibration loss over its margin)."""
    return torch.relu(1 - options.beta * _reward_margin(pairs, False, options))


def cpo_ipo(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """IPO's square without a reference: ``(C - R - 1 / (2 beta))^2``, averaged (after Azar et al., arXiv 2310.12036, eq. 17).

    The paper sums, and compares with a reference.
    """
    return cut_square(_reward_margin(pairs, True, options) - 1 / (2 * options.beta))


def simpo(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """SimPO: ``-(1 - eps) ls(beta (C - R) - gamma) - eps ls(gamma - beta (C - R))``, averaged.

    (Meng et al., arXiv 2405.14734, eq. 6.) Also TPO-L's preference term (Saeidi et al., arXiv 2405.16681). The papers have
    no smoothing.
    """
    return smoothed(options.beta * _reward_margin(pairs, True, options) - options.gamma, options.label_smoothing)


CPO_LOSSES: dict[str, Callable[[Pairs, LikelihoodOptions], torch.Tensor]] = {
    "sigmoid": cpo_sigmoid,
    "hinge": cpo_hinge,
    "ipo": cpo_ipo,
    "simpo": simpo,
}


TPO_LOSSES: dict[str, Callable[[Pairs, LikelihoodOptions], torch.Tensor]] = {
    "sigmoid": cpo_sigmoid,
    "hinge": cpo_hinge,
    "ipo": cpo_ipo,
    "tpo-l": simpo,
}


# Of `CPO_LOSSES` and `TPO_LOSSES`: those on averaged log-probabilities, and those that an option changes.
PER_TOKEN = frozenset({"ipo", "simpo", "tpo-l"})


LIKELIHOOD_OPTION_READERS: dict[str, frozenset[str]] = {
    "label_smoothing": frozenset({"sigmoid", "simpo", "tpo-l"}),
    "gamma": frozenset({"simpo", "tpo-l"}),
}


def log_odds(pairs: Pairs) -> torch.Tensor:
    """ORPO's log odds ratio ``logit(p_c) - logit(p_r)``, ``log p_c = c / |c|`` (Hong et al., arXiv 2403.07691, eq. 4, 7).

    Averaged log-probabilities are cut at ``-1e-12``, where ``p`` is 1 and the odds infinite (TRL: inf or NaN). fp32
    log-probabilities resolve some ``1e-7``, so that nothing but an exact 1 and rounding lies beyond; the gradient is zero
    there. A completion without tokens counts as ``p = 1``.
    """

    def logit(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        log_p = token_mean(logps, lengths).clamp(max=-1e-12)
        return log_p - torch.log(-torch.expm1(log_p))

    return logit(pairs.chosen, pairs.chosen_lengths) - logit(pairs.rejected, pairs.rejected_lengths)


def odds_ratio(pairs: Pairs, beta: float) -> torch.Tensor:
    """ORPO's preference term: ``-beta ls(log odds ratio)`` (Hong et al., arXiv 2403.07691, eq. 6 and 7, beta its lambda)."""
    return -beta * F.logsigmoid(log_odds(pairs))
