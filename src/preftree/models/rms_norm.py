"""RMSNorm whose backward pass is one kernel, for what compiled code makes three of.

A compiler fuses the forward pass with what stands around it. Its backward pass sums along rows, for the gradient of the
input, and down the columns, for the scale's, which reads everything once more; and the gradient that goes past the norm (the
residual branch) is added in between. Here all of it is one pass over memory (`rms_norm_triton`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from preftree.kernels import kernels_for
from preftree.models.custom_ops import composite

KERNELS = "preftree.models.rms_norm_triton"
# Gradients that the kernel adds up itself.
MOST_READERS = 3


class _RmsNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(ctx, x, scale_D, eps, inner, outer, readers):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale_D)
        ctx.eps, ctx.inner = eps, inner
        result = scaled(x, scale_D, eps, inner, outer)
        return x.view_as(x), result, *(result.view_as(result) for _ in range(readers - 1))

    @staticmethod
    def backward(ctx, beside, *grads):
        x, scale_D = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        nothing = (None, None, None, None)
        if not given:
            return beside, None, *nothing
        return *_by(x)(given, beside, x, scale_D, ctx.eps, ctx.inner, ctx.needs_input_grad[1]), *nothing


class _RmsNormRotated(torch.autograd.Function):
    """See `rms_norm_rotated`."""

    @staticmethod
    def forward(ctx, x_BSHD, scale_D, eps, inner, outer, cos, sin):
        ctx.save_for_backward(x_BSHD, scale_D, cos, sin)
        ctx.eps, ctx.inner = eps, inner
        return rotate(scaled(x_BSHD, scale_D, eps, inner, outer).transpose(1, 2), cos, sin)

    @staticmethod
    def backward(ctx, grad_BHSD):
        x_BSHD, scale_D, cos, sin = ctx.saved_tensors
        wants_scale = ctx.needs_input_grad[1]
        given = ([grad_BHSD.transpose(1, 2)], None, x_BSHD, scale_D, ctx.eps, ctx.inner, wants_scale, (cos, sin))
        return *_by(x_BSHD)(*given), None, None, None, None, None


def _by(x: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    kernels = kernels_for(x, KERNELS)
    return gradients if kernels is None else kernels.gradients


def scaled(x: torch.Tensor, scale_D: torch.Tensor, eps: float, inner: torch.dtype, outer: torch.dtype) -> torch.Tensor:
    """The RMSNorm of `rms_norm`, for autograd or a compiler to differentiate."""
    return (scale_D * _normalised(x, eps)[0].to(inner)).to(outer)


def rotate(x_BHSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads rotated by position, see `rms_norm_rotated`."""
    one, two = x_BHSD.chunk(2, -1)
    return x_BHSD * cos + torch.cat((-two, one), -1) * sin


def _rotate_back(grad_BHSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    one, two = (grad_BHSD * sin).chunk(2, -1)
    return grad_BHSD * cos + torch.cat((two, -one), -1)


def _normalised(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / rms(x)`` and ``1 / rms(x)``, in float32."""
    x32 = x.float()
    r = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return x32 * r, r


def gradients(
    grads: list[torch.Tensor],
    beside: torch.Tensor | None,
    x: torch.Tensor,
    scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    wants_scale: bool,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of input and scale; what the kernel is to compute, step by step as autograd rounds it.

    Args:
        grads: of the norm's output, from each of its readers, ``[..., D]``.
        beside: gradient that reaches the input past the norm, or None.
        x: ``[..., D]``.
        inner: type that the normalised input is rounded to before it is scaled.
        rotation: cosines and sines, ``[B, 1, S, D]``, of what the output was rotated by; the gradients (one of them) and x
            are ``[B, S, H, D]`` then.
    """
    if rotation is not None:
        grads = [_rotate_back(grad.transpose(1, 2), *rotation).transpose(1, 2) for grad in grads]
    normed, r = _normalised(x, eps)
    grad = functools.reduce(torch.add, grads).to(torch.promote_types(scale_D.dtype, inner))
    dnormed = (grad * scale_D).to(inner).float()
    dx = (r * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))).to(x.dtype)
    dscale_D = (grad.float() * normed.to(inner).float()).flatten(0, -2).sum(0) if wants_scale else None
    return dx if beside is None else dx + beside, None if dscale_D is None else dscale_D.to(scale_D.dtype)


@composite(
    "rms_norm(Tensor x, Tensor scale, float eps, ScalarType inner, ScalarType outer, int readers) -> (Tensor, Tensor[])"
)
def rms_norm(
    x: torch.Tensor, scale_D: torch.Tensor, eps: float, inner: torch.dtype, outer: torch.dtype, readers: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The input itself, for whatever else reads it, and its RMSNorm (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: ``[..., D]``, normalised in float32.
        scale_D: multiplied with the normalised input.
        inner: type that the normalised input is rounded to before it is scaled.
        outer: type of the result.
        readers: how often the result is given, once to each that reads it, at most `MOST_READERS`.
    """
    beside, *results = _RmsNorm.apply(x, scale_D, eps, inner, outer, readers)
    return beside, results


@composite(
    "rms_norm_rotated(Tensor x, Tensor scale, float eps, ScalarType inner, ScalarType outer, Tensor cos, Tensor sin)"
    " -> Tensor"
)
def rms_norm_rotated(
    x_BSHD: torch.Tensor,
    scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    outer: torch.dtype,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The RMSNorm of each head, rotated by its token's position (Su et al., arXiv 2104.09864, equation 34): ``[B, H, S, D]``.

    A head's first half is paired with its second, as transformers does it.

    Args:
        x_BSHD, scale_D, eps, inner, outer: see `rms_norm`.
        cos, sin: ``[B, 1, S, D]``, in the type of the result.
    """
    return _RmsNormRotated.apply(x_BSHD, scale_D, eps, inner, outer, cos, sin)
