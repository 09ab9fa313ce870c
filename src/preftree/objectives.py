"""Preference objectives: pure functions from log-probabilities or rewards to one loss per pair, example or list.

Notation, per pair: ``c``, ``r`` sums of the policy's log-probabilities over the chosen and rejected completion, ``|c|``,
``|r|`` their tokens, ``c0``, ``r0`` the reference's sums; log-ratios ``a = c - c0`` and ``b = r - r0``; scores ``S =
f(log-ratio)`` with ``f`` the identity for DPO itself (see `scores`), ``D = S_c - S_r``; ``ls`` = log sigmoid, ``s`` =
sigmoid. Formulas are those of TRL's trainers; where a paper differs, the docstring says so. Tensors are ``[P]``, ``P``
pairs, unless a shape is given; fp32 in training, and results keep the dtype of what comes in.

Losses and gradients stay finite in fp32 at log-ratios and averaged log-probabilities of +-500: exponents are cut at 80
(``exp(88.8)`` overflows), and squares at ``1e36``. Neither is reached by values that a loss can still learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_LARGEST_EXPONENT = 80.0


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


@dataclass(frozen=True)
class DPOOptions:
    """Options of the DPO family, named as in TRL's `DPOConfig`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5


def _exp(x: torch.Tensor) -> torch.Tensor:
    """``exp(x)``, the exponent cut at 80, where fp32 is still finite; the gradient is zero beyond."""
    return torch.exp(x.clamp(max=_LARGEST_EXPONENT))


def _squared(x: torch.Tensor) -> torch.Tensor:
    """``x^2``, cut at 1e36: scores of 1e34, as exponentials give them, would overflow."""
    return x.clamp(-1e18, 1e18) ** 2


def _per_token(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums as averages over tokens, that of an empty completion as 0."""
    return values / lengths.clamp(min=1)


DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def scores(log_ratio: torch.Tensor, options: DPOOptions) -> torch.Tensor:
    """``f(log-ratio)`` of f-DPO (Wang et al., arXiv 2309.16240), ``f'`` of the divergence up to constants.

    reverse_kl: ``x``; forward_kl: ``1 - exp(-x)``; js_divergence: ``log 2 + ls(x)``; alpha_divergence:
    ``(exp((alpha - 1) x) - 1) / (alpha - 1)``. Exponents are cut at 80 (TRL cuts alpha_divergence's only).
    """
    kind, alpha = options.f_divergence_type, options.f_alpha_divergence_coef
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return log_ratio
    if kind == "forward_kl":
        return 1 - _exp(-log_ratio)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    if kind == "alpha_divergence":
        return (_exp((alpha - 1) * log_ratio) - 1) / (alpha - 1)
    raise ValueError(f"unknown f_divergence_type {kind!r}: choose from {', '.join(DIVERGENCES)}")


def _delta(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    return scores(pairs.chosen_ratio, options) - scores(pairs.rejected_ratio, options)


def _delta_per_token(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    chosen = _per_token(scores(pairs.chosen_ratio, options), pairs.chosen_lengths)
    return chosen - _per_token(scores(pairs.rejected_ratio, options), pairs.rejected_lengths)


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
    return _squared(_delta_per_token(pairs, options) - 1 / (2 * options.beta))


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


def _smoothed(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def aot(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """AOT on paired data: DPO on the sorted margins of the micro-batch (Melnyk et al., arXiv 2406.05882)."""
    margins = (pairs.chosen - pairs.rejected).sort().values
    ref_margins = (pairs._given("ref_chosen") - pairs._given("ref_rejected")).sort().values
    return _smoothed(options.beta * (margins - ref_margins), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: DPOOptions) -> torch.Tensor:
    """AOT on unpaired data: DPO on the sorted log-ratios of the micro-batch (Melnyk et al., arXiv 2406.05882)."""
    difference = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(options.beta * difference, options.label_smoothing)


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
    return -F.logsigmoid(logits) * torch.sigmoid(-blend) + _exp(F.logsigmoid(blend) - logits)


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
        value = _per_token(logps, lengths) if per_token else logps
        if options.alpha == 0:
            return value
        return -torch.expm1((-options.alpha * value).clamp(max=_LARGEST_EXPONENT)) / options.alpha

    return reward(pairs.chosen, pairs.chosen_lengths), reward(pairs.rejected, pairs.rejected_lengths)


def _reward_margin(pairs: Pairs, per_token: bool, options: LikelihoodOptions) -> torch.Tensor:
    chosen, rejected = implicit_rewards(pairs, per_token, options)
    return chosen - rejected


def cpo_sigmoid(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """CPO: ``-(1 - eps) ls(beta (C - R)) - eps ls(-beta (C - R))``, summed (Xu et al., arXiv 2401.08417, eq. 3).

    Also TPO's preference term (Saeidi et al., arXiv 2405.16681). The papers have no smoothing.
    """
    return _smoothed(options.beta * _reward_margin(pairs, False, options), options.label_smoothing)


def cpo_hinge(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """SLiC: ``max(0, 1 - beta (C - R))``, summed (Zhao et al., arXiv 2305.10425, rank calibration loss over its margin)."""
    return torch.relu(1 - options.beta * _reward_margin(pairs, False, options))


def cpo_ipo(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """IPO's square without a reference: ``(C - R - 1 / (2 beta))^2``, averaged (after Azar et al., arXiv 2310.12036, eq. 17).

    The paper sums, and compares with a reference.
    """
    return _squared(_reward_margin(pairs, True, options) - 1 / (2 * options.beta))


def simpo(pairs: Pairs, options: LikelihoodOptions) -> torch.Tensor:
    """SimPO: ``-(1 - eps) ls(beta (C - R) - gamma) - eps ls(gamma - beta (C - R))``, averaged.

    (Meng et al., arXiv 2405.14734, eq. 6.) Also TPO-L's preference term (Saeidi et al., arXiv 2405.16681). The papers have
    no smoothing.
    """
    return _smoothed(options.beta * _reward_margin(pairs, True, options) - options.gamma, options.label_smoothing)


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
        log_p = _per_token(logps, lengths).clamp(max=-1e-12)
        return log_p - torch.log(-torch.expm1(log_p))

    return logit(pairs.chosen, pairs.chosen_lengths) - logit(pairs.rejected, pairs.rejected_lengths)


def odds_ratio(pairs: Pairs, beta: float) -> torch.Tensor:
    """ORPO's preference term: ``-beta ls(log odds ratio)`` (Hong et al., arXiv 2403.07691, eq. 6 and 7, beta its lambda)."""
    return -beta * F.logsigmoid(log_odds(pairs))


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


def bradley_terry(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """Reward modelling: ``-ls(c - r - margin) + coefficient (c + r)^2`` of rewards ``c``, ``r``.

    (Bradley and Terry, 1952; Ouyang et al., arXiv 2203.02155, eq. 1; the margin: Touvron et al., Llama 2, arXiv 2307.09288,
    eq. 2; the last term, which centres rewards: Eisenstein et al., arXiv 2312.09244, eq. 2.)

    Args:
        chosen, rejected: ``[P]``, rewards.
        margin: ``[P]``, by how much the chosen one is better at least, or None.
        center_rewards_coefficient: None leaves the last term out.
    """
    losses = -F.logsigmoid(chosen - rejected - (0 if margin is None else margin))
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen + rejected) ** 2
    return losses


def plackett_luce(ratio: torch.Tensor, sizes: Sequence[int], beta: float) -> torch.Tensor:
    """DPO for ranked lists: ``-sum_k [beta x_k - log sum_{j >= k} exp(beta x_j)]`` (Rafailov et al., arXiv 2305.18290, A.3).

    Computed as ``-sum_k ls(-log sum_{j > k} exp(beta (x_j - x_k)))``, which for two responses is `sigmoid`.

    Args:
        ratio: ``[n]``, log-ratios ``x`` of each list's responses, best first, lists one behind the other.
        sizes: responses of each list, ``L`` numbers.

    Returns:
        ``[L]``; a list of one response has no loss.

    Raises:
        ValueError: sizes are not positive or do not add up to ``n``.
    """
    if not sizes or min(sizes) < 1 or sum(sizes) != len(ratio):
        raise ValueError(f"sizes of ranked lists must be positive and add up to {len(ratio)} responses: {list(sizes)}")
    x_LK = torch.nn.utils.rnn.pad_sequence(ratio.split(list(sizes)), batch_first=True)
    place_K = torch.arange(x_LK.shape[1], device=ratio.device)
    given_LK = place_K < torch.tensor(sizes, device=ratio.device)[:, None]
    worse_LKK = given_LK[:, None, :] & (place_K[None, :] > place_K[:, None])
    margins_LKK = beta * (x_LK[:, None, :] - x_LK[:, :, None])
    # Nothing is worse than a list's last response: its rivals sum to exp(-inf), its loss and gradient to zero.
    rivals_LK = margins_LKK.masked_fill(~worse_LKK, -math.inf).logsumexp(-1)
    return -F.logsigmoid(-rivals_LK).sum(1)


def lambda_weights(scores: Sequence[float]) -> list[tuple[int, int, float]]:
    """LiPO-lambda's weight of each pair of a list: ``|2^q_i - 2^q_j| |1 / D(rank_i) - 1 / D(rank_j)|`` for scores ``q``.

    ``D(rank) = log2(1 + rank)``, ranks 1, 2, ... from the best score on, equal scores in the order given. (Liu et al., arXiv
    2402.01878, after LambdaLoss.) The paper ranks by the policy's current log-ratios; here ranks are the labels', so that
    weights are fixed numbers. A pair's loss is its weight times `sigmoid`.

    Returns:
        ``(better, worse, weight)``, places in ``scores``; best first. Equal scores make no pair.

    Raises:
        ValueError: a score is not finite, or so large that fp32 cannot hold its gain.
    """
    if not all(math.isfinite(score) and score <= 100 for score in scores):
        raise ValueError(
            f"lambda weights grow as 2^score: scores must be finite and at most 100, rescale {list(scores)}"
        )
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    discounts = [1 / math.log2(1 + rank) for rank in range(1, len(scores) + 1)]
    return [
        (better, worse, (2.0 ** scores[better] - 2.0 ** scores[worse]) * (discounts[k] - discounts[m]))
        for k, better in enumerate(order)
        for m, worse in enumerate(order[k + 1 :], k + 1)
        if scores[better] != scores[worse]
    ]


def load_balancing(counts: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Auxiliary loss of a mixture of experts: ``E sum_e f_e P_e`` (Fedus et al., Switch, arXiv 2101.03961, eq. 4-6).

    Args:
        counts: ``[E]``, how often each expert was chosen, over all layers and tokens (eq. 5 before its division).
        probs: ``[E]``, sums of the routers' probabilities over the same (eq. 6); the gradient goes through these alone.
    """
    total = probs.detach().sum()  # a token's probabilities sum to one: this many tokens, times layers
    return len(counts) * (counts / total * (probs / total)).sum()


def wpo_weight(logps: torch.Tensor, log_sum_sq_probs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """WPO's weight of a completion: how probable the policy finds it, against what it would sample itself.

    ``exp(mean over its tokens of log p(y) - log sum_v p_v^2)``; a pair's loss is multiplied by both of its weights (Zhou et
    al., arXiv 2406.11827, eq. 2).

    Args:
        logps: ``[n]``, sums over the completion's tokens.
        log_sum_sq_probs: ``[n]``, sums of ``log sum_v p_v^2`` over the same tokens.
        lengths: ``[n]``, how many these are.

    Returns:
        ``[n]``, without gradient.
    """
    return ((logps - log_sum_sq_probs).detach() / lengths.clamp(min=1)).exp()


def completion_weights(lengths: torch.Tensor, ld_alpha: float) -> torch.Tensor:
    """LD-DPO's weight of each scored token (Liu et al., arXiv 2409.06411): 1 up to the shorter of a pair's completions,
    ``ld_alpha`` beyond.

    Args:
        lengths: LongTensor ``[2 P]``, scored tokens of chosen, rejected, chosen, ...

    Returns:
        fp32 ``[sum of lengths]``, sequence by sequence.
    """
    public = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    index = torch.arange(int(lengths.max()), device=lengths.device)
    weights = torch.where(index[None, :] < public[:, None], 1.0, ld_alpha)
    return weights[index[None, :] < lengths[:, None]]
