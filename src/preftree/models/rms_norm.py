"""RMSNorm whose backward pass is one kernel, for what compiled code makes three of.

A compiler fuses the forward pass with what stands around it. Its backward pass sums along rows, for the gradient of the
input, and down the columns, for the scale's, which reads everything once more; and the gradient that goes past the norm (the
residual branch) is added in between. Here all of it is one pass over memory (`rms_norm_triton`).
"""

from __future__ import annotations

import functools

import torch

from preftree.kernels import kernels_of

_library = torch.library.Library("preftree", "FRAGMENT")
_library.define(
    "rms_norm(Tensor x, Tensor scale, float eps, ScalarType inner, ScalarType outer, int readers) -> (Tensor, Tensor[])",
)

# Gradients that the kernel adds up itself.
MOST_READERS = 3


class _RmsNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(ctx, x, scale_D, eps, inner, outer, readers):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale_D)
        ctx.eps, ctx.inner = eps, inner
        normed, _ = _normalised(x, eps)
        result = (scale_D * normed.to(inner)).to(outer)
        return x.view_as(x), result, *(result.view_as(result) for _ in range(readers - 1))

    @staticmethod
    def backward(ctx, beside, *grads):
        x, scale_D = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        nothing = (None, None, None, None)
        if not given:
            return beside, None, *nothing
        kernels = kernels_of("preftree.models.rms_norm_triton") if x.is_cuda else None
        run = gradients if kernels is None else kernels.gradients
        return *run(given, beside, x, scale_D, ctx.eps, ctx.inner, ctx.needs_input_grad[1]), *nothing


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of input and scale; what the kernel is to compute, step by step as autograd rounds it.

    Args:
        grads: of the norm's output, from each of its readers, ``[..., D]``.
        beside: gradient that reaches the input past the norm, or None.
        x: ``[..., D]``.
        inner: type that the normalised input is rounded to before it is scaled.
    """
    normed, r = _normalised(x, eps)
    grad = functools.reduce(torch.add, grads).to(torch.promote_types(scale_D.dtype, inner))
    dnormed = (grad * scale_D).to(inner).float()
    dx = (r * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))).to(x.dtype)
    dscale_D = (grad.float() * normed.to(inner).float()).flatten(0, -2).sum(0) if wants_scale else None
    return dx if beside is None else dx + beside, None if dscale_D is None else dscale_D.to(scale_D.dtype)


@torch.library.impl(_library, "rms_norm", "CompositeImplicitAutograd")
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
