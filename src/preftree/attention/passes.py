"""Forward and backward pass of attention as two calls, for who keeps what lies between them himself: compiled layers.

An ``attend`` (see `preftree.attention`) may have ``forward(q, k, v, scores) -> (out, lse)`` and ``backward(grad, q, k, v, out,
lse, scores) -> gradients``, of which `differentiable` makes one call for all others. Of one that has not, the backward pass
computes the forward pass again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from preftree.attention.scores import Scores

# Of queries, keys, values, sinks and bias; None where there is none.
Gradients = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def forward(
    attend: Any, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, H, S, E]``, and what `backward` wants: log-sum-exps ``[B, H, S]``, or anything of that shape."""
    if hasattr(attend, "forward"):
        return attend.forward(q_BHSD, k_BGSD, v_BGSE, scores)
    return recomputed_forward(attend, q_BHSD, k_BGSD, v_BGSE, scores)


def backward(
    attend: Any,
    grad_BHSE: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSE: torch.Tensor,
    out_BHSE: torch.Tensor,
    lse_BHS: torch.Tensor,
    scores: Scores,
) -> Gradients:
    """Gradients, given the output's and what `forward` gave."""
    if hasattr(attend, "backward"):
        return attend.backward(grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores)
    return recomputed_backward(attend, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, scores)


def recomputed_forward(
    attend: Any, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward`, of what keeps nothing for its backward pass."""
    with torch.no_grad():
        out_BHSE = attend(q_BHSD, k_BGSD, v_BGSE, scores)
    batch, heads, _, _ = q_BHSD.shape
    return out_BHSE, q_BHSD.new_zeros((batch, heads, k_BGSD.shape[2]), dtype=torch.float32)


def _autograd_inside_operators() -> AbstractContextManager[None]:
    """Let gradients be recorded also where PyTorch has already taken a custom operator's for recorded."""
    core: Any = torch._C
    excluded = core._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(core.DispatchKey, name))
    return core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), excluded)


def recomputed_backward(
    attend: Any,
    grad_BHSE: torch.Tensor,
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSE: torch.Tensor,
    scores: Scores,
) -> Gradients:
    """As `backward`, by computing the forward pass again."""
    given = (q_BHSD, k_BGSD, v_BGSE, scores.sinks, scores.bias)
    with _autograd_inside_operators(), torch.enable_grad():
        q, k, v, sinks, bias = leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        out_BHSE = attend(q, k, v, replace(scores, sinks=sinks, bias=bias))
        found = iter(torch.autograd.grad(out_BHSE, [x for x in leaves if x is not None], grad_BHSE, allow_unused=True))
    return tuple(None if x is None else next(found) for x in leaves)  # type: ignore[return-value]


class _Differentiable(torch.autograd.Function):
    """See `differentiable`."""

    @staticmethod
    def forward(ctx, attend, scale, softcap, *given):
        q_BHSD, k_BGSD, v_BGSE, sinks, bias = given
        out_BHSE, lse_BHS = attend.forward(q_BHSD, k_BGSD, v_BGSE, Scores(scale, softcap, sinks, bias))
        ctx.save_for_backward(*given, out_BHSE, lse_BHS)
        ctx.attend, ctx.scale, ctx.softcap = attend, scale, softcap
        return out_BHSE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHSE):
        q_BHSD, k_BGSD, v_BGSE, sinks, bias, out_BHSE, lse_BHS = ctx.saved_tensors
        scores = Scores(ctx.scale, ctx.softcap, sinks, bias)
        return None, None, None, *ctx.attend.backward(grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores)


def differentiable(
    attend: Any, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """The output ``[B, H, S, E]`` of an ``attend`` that has both passes, with its gradients."""
    given = q_BHSD, k_BGSD, v_BGSE, scores.sinks, scores.bias
    return _Differentiable.apply(attend, scores.scale, scores.softcap, *given)
