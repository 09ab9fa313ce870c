"""Weights of tokens and completions (LD-DPO, WPO), and a mixture of experts' auxiliary loss."""

from __future__ import annotations

import torch


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
