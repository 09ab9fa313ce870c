"""What is read off logits, token by token: the log-probability of a target, and statistics of the distribution."""

from __future__ import annotations

import torch

from preftree.kernels import kernels_of

# The arrays that statistics need beside the logits hold at most this many numbers, to stay in a processor's cache.
_STATISTICS_PER_CHUNK = 1 << 22


def token_scores(logits_CV: torch.Tensor, targets_C: torch.Tensor, statistics: bool) -> dict[str, torch.Tensor]:
    """Scores of ``C`` tokens from their logits, computed in float32 and given as fp32 ``[C]``.

    Args:
        logits_CV: of any floating type; the gradient of the log-probabilities goes back to them.
        targets_C: LongTensor, ids below ``V``.
        statistics: more than the log-probabilities, without gradients.

    Returns:
        "token_logps"; with statistics also "entropy" (nats), "mean_logits", "is_top1" (bool; the lowest id wins a tie) and
        "log_sum_sq_probs" (``log sum_v p_v^2``).
    """
    half_or_single = logits_CV.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if logits_CV.is_cuda and half_or_single and (kernels := kernels_of("preftree.token_scores_triton")) is not None:
        return kernels.token_scores(logits_CV, targets_C, statistics)
    logits_CV = logits_CV.float()
    log_z_C = logits_CV.logsumexp(-1)
    scores = {"token_logps": logits_CV.gather(-1, targets_C[:, None])[:, 0] - log_z_C}
    if statistics:
        with torch.no_grad():
            size = max(1, _STATISTICS_PER_CHUNK // logits_CV.shape[-1])
            parts = zip(logits_CV.split(size), log_z_C.split(size), targets_C.split(size), strict=True)
            each = [_statistics(*part) for part in parts]
            scores |= {name: torch.cat([part[name] for part in each]) for name in each[0]}
    return scores


def _statistics(logits_CV: torch.Tensor, log_z_C: torch.Tensor, targets_C: torch.Tensor) -> dict[str, torch.Tensor]:
    # Entries that a model masks out with -inf have probability 0 and add nothing to the entropy.
    log_p_CV = (logits_CV - log_z_C[:, None]).clamp_(min=torch.finfo(torch.float32).min)
    p_CV = log_p_CV.exp()
    # Sums over the vocabulary, never dot products: those add up in an order that loses three digits over 50,000 terms.
    return {
        "entropy": -log_p_CV.mul_(p_CV).sum(-1),
        "mean_logits": logits_CV.mean(-1),
        "is_top1": logits_CV.argmax(-1) == targets_C,
        "log_sum_sq_probs": p_CV.square_().sum(-1).log(),
    }
