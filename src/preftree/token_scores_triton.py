"""Triton kernels of `token_scores`: one pass over the logits forward, one backward, nothing of their size in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Columns that a program looks at together; forward, in so many parts of a row.
_FORWARD_BLOCK, _PARTS = 2048, 4
_BACKWARD_BLOCK = 4096
# Stands for -inf where a difference to it must be a number. (Logits are never as low.)
_LOW = tl.constexpr(-1e30)


@triton.jit
def _scores_kernel(
    logits, targets, log_z, token_logps, entropy, mean_logits, is_top1, log_sum_sq, stride, width,
    STATISTICS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's scores from sums that each lane keeps against the largest logit that it has met.

    Sums of a lane are short and are added up as a tree, which keeps digits over a large vocabulary.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    before = target.to(tl.int32)
    chosen = tl.load(logits + target).to(tl.float32)
    lane = tl.arange(0, PARTS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    largest = tl.full([BLOCK], _LOW, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)  # sum of e^(x - largest)
    moment = tl.zeros([BLOCK], tl.float32)  # sum of (x - largest) e^(x - largest)
    squares = tl.zeros([BLOCK], tl.float32)  # sum of e^(2 (x - largest))
    total = tl.zeros([BLOCK], tl.float32)
    ahead = tl.zeros([BLOCK], tl.int32)  # how many as large as the target's stand before it
    for start in range(0, width, PARTS * BLOCK):
        column = start + lane
        inside = column < width
        given = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.maximum(given, _LOW)
        higher = tl.maximum(largest, tl.max(x, 0))
        fall = largest - higher
        shrink = tl.exp(fall)
        below = x - higher[None, :]
        e = tl.exp(below)
        if STATISTICS:
            moment = (moment + mass * fall) * shrink + tl.sum(below * e, 0)
            squares = squares * shrink * shrink + tl.sum(e * e, 0)
            total += tl.sum(tl.where(inside, given, 0.0), 0)
            ahead += tl.sum(((given == chosen) & (column < before)).to(tl.int32), 0)
        mass = mass * shrink + tl.sum(e, 0)
        largest = higher
    top = tl.max(largest, 0)
    fall = largest - top
    shrink = tl.exp(fall)
    # Where all is -inf there is no distribution.
    z = tl.where(top > _LOW, tl.sum(mass * shrink, 0), float("nan"))
    tl.store(log_z + row, top + tl.log(z))
    tl.store(token_logps + row, (chosen - top) - tl.log(z))
    if STATISTICS:
        tl.store(entropy + row, tl.log(z) - tl.sum((moment + mass * fall) * shrink, 0) / z)
        tl.store(mean_logits + row, tl.sum(total, 0) / width)
        tl.store(log_sum_sq + row, tl.log(tl.sum(squares * shrink * shrink, 0)) - 2 * tl.log(z))
        tl.store(is_top1 + row, (chosen == top) & (tl.sum(ahead, 0) == 0))


@triton.jit
def _gradient_kernel(logits, targets, log_z, upstream, gradient, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(logits + row.to(tl.int64) * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.load(log_z + row))
    one = (column == tl.load(targets + row)).to(tl.float32)
    value = tl.load(upstream + row) * (one - p)
    tl.store(gradient + row.to(tl.int64) * width + column, value.to(gradient.dtype.element_ty), mask=inside)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_CV, targets_C, statistics):
        if logits_CV.stride(-1) != 1:
            logits_CV = logits_CV.contiguous()
        count, width = logits_CV.shape
        log_z_C, *scores = (logits_CV.new_empty(count, dtype=torch.float32) for _ in range(5))
        is_top1_C = torch.empty(count, dtype=torch.bool, device=logits_CV.device)
        token_logps_C, entropy_C, mean_logits_C, log_sum_sq_C = scores
        if count:
            _scores_kernel[(count,)](
                logits_CV, targets_C, log_z_C, token_logps_C, entropy_C, mean_logits_C, is_top1_C, log_sum_sq_C,
                logits_CV.stride(0), width, STATISTICS=statistics, PARTS=_PARTS, BLOCK=_FORWARD_BLOCK, num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(logits_CV, targets_C, log_z_C)
        given = (entropy_C, mean_logits_C, is_top1_C, log_sum_sq_C)
        ctx.mark_non_differentiable(*given)
        return token_logps_C, *given

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream_C, *_):
        logits_CV, targets_C, log_z_C = ctx.saved_tensors
        count, width = logits_CV.shape
        gradient_CV = torch.empty(count, width, dtype=logits_CV.dtype, device=logits_CV.device)
        if count:
            grid = (count, triton.cdiv(width, _BACKWARD_BLOCK))
            _gradient_kernel[grid](
                logits_CV, targets_C, log_z_C, upstream_C.contiguous(), gradient_CV, logits_CV.stride(0), width,
                BLOCK=_BACKWARD_BLOCK, num_warps=8,
            )  # fmt: skip
        return gradient_CV, None, None


def token_scores(logits_CV: torch.Tensor, targets_C: torch.Tensor, statistics: bool) -> dict[str, torch.Tensor]:
    """See `preftree.token_scores.token_scores`; logits in float32, bfloat16 or float16 on a GPU."""
    token_logps, entropy, mean_logits, is_top1, log_sum_sq = _TokenScores.apply(logits_CV, targets_C, statistics)
    scores = {"token_logps": token_logps}
    if statistics:
        scores |= {
            "entropy": entropy,
            "mean_logits": mean_logits,
            "is_top1": is_top1,
            "log_sum_sq_probs": log_sum_sq,
        }
    return scores
