"""Rewards of pairs, and ranked lists: Bradley-Terry, Plackett-Luce, and LiPO's weights of a list's pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


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
