"""Queries, keys and values by one product, where queries and keys are normed and rotated.

Three products of one input make three gradients of it, each written and read again to be added up. As one product it makes
one. Its own gradient is put together by the kernel that computes those of norms and rotations, in place.
"""

from __future__ import annotations

import torch

from preftree.kernels import kernels_for
from preftree.models import products, rms_norm
from preftree.models.custom_ops import composite, fake, opaque


@opaque(
    "normed_heads_gradients(Tensor dq, Tensor dk, Tensor dv, Tensor projected, Tensor query_scale, Tensor key_scale, "
    "float eps, ScalarType inner, Tensor cos, Tensor sin, bool wants_scales) -> (Tensor, Tensor)"
)
def _gradients(dq_BHSD, dk_BGSD, dv_BGSE, projected_BSE, *given):
    kernels = kernels_for(projected_BSE, rms_norm.KERNELS)
    compute = gradients if kernels is None else kernels.heads_gradients
    return compute(*(grad.transpose(1, 2) for grad in (dq_BHSD, dk_BGSD, dv_BGSE)), projected_BSE, *given)


@fake(_gradients)
def _(dq, dk, dv, projected_BSE, q_scale_D, k_scale_D, eps, inner, cos, sin, wants_scales):
    dscales_2D = q_scale_D.new_empty((2, len(q_scale_D) if wants_scales else 0))
    return torch.empty_like(projected_BSE, memory_format=torch.contiguous_format), dscales_2D


def gradients(
    dq_BSHD: torch.Tensor,
    dk_BSGD: torch.Tensor,
    dv_BSGE: torch.Tensor,
    projected_BSE: torch.Tensor,
    q_scale_D: torch.Tensor,
    k_scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    cos: torch.Tensor,
    sin: torch.Tensor,
    wants_scales: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the projection, and of both scales, ``[2, D]``, or ``[2, 0]`` if they are not wanted.

    Args:
        dq_BSHD, dk_BSGD, dv_BSGE: of queries and keys as they are normed and rotated, and of values.
        projected_BSE: queries, keys and values behind each other as they are projected.
    """
    grads = [dq_BSHD, dk_BSGD, dv_BSGE]
    parts = projected_BSE.split([grad.shape[2] * grad.shape[3] for grad in grads], -1)
    projected, dscales = [], []
    for grad, part, scale_D in zip(grads[:2], parts[:2], (q_scale_D, k_scale_D), strict=True):
        x = part.unflatten(-1, grad.shape[2:])
        dx, dscale_D = rms_norm.gradients([grad], None, x, scale_D, eps, inner, wants_scales, (cos, sin))
        projected.append(dx)
        dscales.append(scale_D.new_empty(0) if dscale_D is None else dscale_D)
    return torch.cat([each.flatten(-2) for each in (*projected, dv_BSGE)], -1), torch.stack(dscales)


def rotated(
    projected_BSE: torch.Tensor,
    counts: list[int],
    q_scale_D: torch.Tensor,
    k_scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> list[torch.Tensor]:
    """Queries ``[B, S, H, D]`` and keys ``[B, S, G, D]``, of which there are ``counts``, normed and rotated."""
    sizes = [count * len(q_scale_D) for count in counts]
    parts = projected_BSE[..., : sum(sizes)].split(sizes, -1)
    return [
        rms_norm.rotate(
            rms_norm.scaled(part.unflatten(-1, (count, -1)), scale_D, eps, inner, part.dtype).transpose(1, 2), cos, sin
        ).transpose(1, 2)
        for part, count, scale_D in zip(parts, counts, (q_scale_D, k_scale_D), strict=True)
    ]


class _NormedHeads(torch.autograd.Function):
    """See `normed_heads`."""

    @staticmethod
    def forward(ctx, x_BSD, query, key, value, q_scale_D, k_scale_D, eps, inner, cos, sin, value_size):
        weights, x_ND, size = [query, key, value], x_BSD.flatten(0, 1), len(q_scale_D)
        projected_BSE = products.linears(x_ND, weights).view(*x_BSD.shape[:2], -1)
        ctx.save_for_backward(x_ND, *weights, projected_BSE, q_scale_D, k_scale_D, cos, sin)
        ctx.eps, ctx.inner = eps, inner
        counts = [query.shape[0] // size, key.shape[0] // size]
        kernels = kernels_for(projected_BSE, rms_norm.KERNELS)
        compute = rotated if kernels is None else kernels.rotated_heads
        normed = compute(projected_BSE, counts, q_scale_D, k_scale_D, eps, inner, cos, sin)
        v_BSGE = projected_BSE[..., sum(counts) * size :].unflatten(-1, (-1, value_size))
        return tuple(x.transpose(1, 2) for x in (*normed, v_BSGE))

    @staticmethod
    def backward(ctx, *grads):
        x_ND, *weights, projected_BSE, q_scale_D, k_scale_D, cos, sin = ctx.saved_tensors
        wants_x, *wants_weights = ctx.needs_input_grad[:4]
        wants_scales = any(ctx.needs_input_grad[4:6])
        given = *grads, projected_BSE, q_scale_D, k_scale_D, ctx.eps, ctx.inner, cos, sin, wants_scales
        projected_grad_BSE, dscales_2D = _gradients(*given)
        grad_NE = projected_grad_BSE.flatten(0, 1)
        dx = products.linears_input_gradient(grad_NE, weights) if wants_x else None
        dweights = [None] * 3
        if any(wants_weights):
            dweights = products.weight_gradient(grad_NE, x_ND, weights).split([len(weight) for weight in weights])
        dx_BSD = None if dx is None else dx.view(*projected_BSE.shape[:2], -1)
        return dx_BSD, *dweights, *(dscales_2D if wants_scales else (None, None)), None, None, None, None, None


@composite(
    "normed_heads(Tensor x, Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, float eps, "
    "ScalarType inner, Tensor cos, Tensor sin, int value_size) -> (Tensor, Tensor, Tensor)"
)
def normed_heads(
    x_BSD: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_scale_D: torch.Tensor,
    k_scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    cos: torch.Tensor,
    sin: torch.Tensor,
    value_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[B, H, S, D]``, keys ``[B, G, S, D]`` and values ``[B, G, S, E]`` of tokens, in the input's type.

    Queries and keys are normed head by head and rotated by position (see `rms_norm.rms_norm_rotated`).

    Args:
        x_BSD: what all three are projected from.
        query, key, value: the projections' weights, as `torch.nn.Linear` holds them.
        q_scale_D, k_scale_D, eps, inner: of the norms, see `rms_norm.rms_norm`.
        cos, sin: ``[B, 1, S, D]``.
        value_size: E.
    """
    return _NormedHeads.apply(x_BSD, query, key, value, q_scale_D, k_scale_D, eps, inner, cos, sin, value_size)
