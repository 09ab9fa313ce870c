"""Triton kernel of `rms_norm`'s backward pass: everything is read once, and the gradient of the input written."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from preftree.models.rms_norm import MOST_READERS

# Programs on each of a device's processors, their warps, and how many elements they look at together.
_PER_PROCESSOR, _WARPS, _ELEMENTS = 4, 8, 2048
# Of the programs' parts of the scale's gradient, columns that one program adds up, and how many parts at a time.
_SUMMED, _LINES = 16, 64

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _gradients_kernel(
    grad, second, third, beside, x, scale, dx, partial, rows, inner_rows,
    grad_outer, grad_inner, second_outer, second_inner, third_outer, third_inner,
    beside_outer, beside_inner, x_outer, x_inner, cos, sin, heads,
    eps: tl.constexpr, width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    GRADS: tl.constexpr, BESIDE: tl.constexpr, SCALE: tl.constexpr, ROTATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the program's number and every so many on; its part of the scale's gradient goes to a line of ``partial``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(program * TILE, rows, programs * TILE):
        row = start + tl.arange(0, TILE)[:, None]
        read = inside & (row < rows)
        outer, inner = (row // inner_rows).to(tl.int64), row % inner_rows
        x32 = tl.load(x + outer * x_outer + inner * x_inner + column, mask=read, other=0.0).to(tl.float32)
        dy = tl.load(grad + outer * grad_outer + inner * grad_inner + column, mask=read, other=0.0)
        if GRADS > 1:
            dy += tl.load(second + outer * second_outer + inner * second_inner + column, mask=read, other=0.0)
        if GRADS > 2:
            dy += tl.load(third + outer * third_outer + inner * third_inner + column, mask=read, other=0.0)
        if ROTATED:
            # Rounded where autograd rounds it.
            partner = tl.where(column < width // 2, column + width // 2, column - width // 2)
            token = (row // heads).to(tl.int64)
            c = tl.load(cos + token * width + column, mask=read, other=0.0).to(tl.float32)
            s = tl.load(sin + token * width + partner, mask=read, other=0.0).to(tl.float32)
            other_half = tl.load(grad + outer * grad_outer + inner * grad_inner + partner, mask=read, other=0.0)
            turned = (other_half.to(tl.float32) * s).to(dy.dtype).to(tl.float32)
            straight = (dy.to(tl.float32) * c).to(dy.dtype).to(tl.float32)
            dy = (straight + tl.where(column < width // 2, turned, -turned)).to(dy.dtype)
        dy = dy.to(tl.float32)
        r = tl.rsqrt(tl.sum(x32 * x32, 1)[:, None] / width + eps)
        normed = x32 * r
        dnormed = (dy * factor).to(PRODUCT).to(INNER).to(tl.float32)
        along = tl.sum(dnormed * normed, 1)[:, None] / width
        d = (r * (dnormed - normed * along)).to(dx.dtype.element_ty)
        if BESIDE:
            other = tl.load(beside + outer * beside_outer + inner * beside_inner + column, mask=read, other=0.0)
            d = (d.to(tl.float32) + other.to(tl.float32)).to(dx.dtype.element_ty)
        tl.store(dx + row.to(tl.int64) * width + column, d, mask=read)
        if SCALE:
            total += dy * normed.to(INNER).to(tl.float32)
    if SCALE:
        tl.store(partial + program * width + column, tl.sum(total, 0)[None, :], mask=inside)


@triton.jit
def _sum_kernel(partial, total, lines, width, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all lines, for the program's columns."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    found = tl.zeros([LINES, BLOCK], tl.float32)
    for start in range(0, lines, LINES):
        line = start + tl.arange(0, LINES)[:, None]
        found += tl.load(partial + line * width + column, mask=(line < lines) & (column < width), other=0.0)
    result = tl.sum(found, 0)[None, :].to(total.dtype.element_ty)
    tl.store(total + column, result, mask=column < width)


@functools.cache
def _programs(device: torch.device) -> int:
    return _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: torch.Tensor) -> torch.Tensor:
    """As ``[outer, inner, D]``, where it lies if it can: heads are columns of a larger matrix."""
    if x.ndim < 3 or x.is_contiguous() or x.stride(-1) != 1:
        return x.reshape(-1, 1, x.shape[-1])
    return x.reshape(-1, *x.shape[-2:])


@torch.library.triton_op("preftree::rms_norm_gradients", mutates_args=())
def _gradients(
    grads: list[torch.Tensor],
    beside: torch.Tensor | None,
    x: torch.Tensor,
    scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    wants_scale: bool,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm.gradients`; the scale's is empty if it is not wanted."""
    # What is not there is not read.
    read = [*[*grads, *grads[:1] * MOST_READERS][:MOST_READERS], x if beside is None else beside, x]
    rows = [_rows(each) for each in read]
    if len({each.shape[1] for each in rows}) > 1:
        rows = [_rows(each.contiguous()) for each in read]
    outer, middle, width = rows[-1].shape
    programs = _programs(x.device)
    dx = x.new_empty(x.shape)
    partial = x.new_empty((programs if wants_scale else 0, width), dtype=torch.float32)
    dscale_D = scale_D.new_empty(width if wants_scale else 0)
    block = triton.next_power_of_2(width)
    torch.library.wrap_triton(_gradients_kernel)[(programs,)](
        *rows, scale_D.contiguous(), dx, partial, outer * middle, middle,
        *(step for each in rows for step in each.stride()[:2]),
        *(x if each is None else each.contiguous() for each in (cos, sin)), 1 if cos is None else x.shape[-2],
        eps=eps, width=width, INNER=_TYPES[inner], PRODUCT=_TYPES[torch.promote_types(scale_D.dtype, inner)],
        GRADS=len(grads), BESIDE=beside is not None, SCALE=wants_scale, ROTATED=cos is not None,
        TILE=max(1, _ELEMENTS // block), BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    if wants_scale:
        torch.library.wrap_triton(_sum_kernel)[(triton.cdiv(width, _SUMMED),)](
            partial, dscale_D, programs, width, LINES=_LINES, BLOCK=_SUMMED
        )
    return dx, dscale_D


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
    """See `rms_norm.gradients`."""
    dx, dscale_D = _gradients(grads, beside, x, scale_D, eps, inner, wants_scale, *(rotation or (None, None)))
    return dx, dscale_D if wants_scale else None
