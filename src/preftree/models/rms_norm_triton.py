"""Triton kernel of `rms_norm`'s backward pass: everything is read once, and the gradient of the input written."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from preftree.models.rms_norm import MOST_READERS

# Programs on each of a device's processors, their warps, and how many elements they look at together.
_PER_PROCESSOR, _WARPS, _ELEMENTS = 4, 8, 2048
# Bytes of rows that may wait in a processor's shared memory while others are looked at: less than any device has.
_WAITING = 1 << 16
# Of the programs' parts of the scale's gradient, columns that one program adds up, and how many parts at a time.
_SUMMED, _LINES = 16, 64

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pass_over_rows(
    first, step, grad, second, third, beside, x, scale, dx, partial, rows, inner_rows,
    grad_outer, grad_inner, second_outer, second_inner, third_outer, third_inner,
    beside_outer, beside_inner, x_outer, x_inner, dx_outer, dx_inner, cos, sin, heads,
    eps: tl.constexpr, width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    GRADS: tl.constexpr, BESIDE: tl.constexpr, SCALE: tl.constexpr, ROTATED: tl.constexpr,
    STAGES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of rows from ``first`` on, every ``step``; their part of the scale's gradient goes to the line ``partial``."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < width
    factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    # The next rows are on their way while these are looked at.
    for start in tl.range(first * TILE, rows, step * TILE, num_stages=STAGES):
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
        tl.store(dx + outer * dx_outer + inner * dx_inner + column, d, mask=read)
        if SCALE:
            total += dy * normed.to(INNER).to(tl.float32)
    if SCALE:
        tl.store(partial + column, tl.sum(total, 0)[None, :], mask=inside)


@triton.jit
def _gradients_kernel(
    grad, second, third, beside, x, scale, dx, partial, rows, inner_rows,
    grad_outer, grad_inner, second_outer, second_inner, third_outer, third_inner,
    beside_outer, beside_inner, x_outer, x_inner, dx_outer, dx_inner, cos, sin, heads,
    eps: tl.constexpr, width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    GRADS: tl.constexpr, BESIDE: tl.constexpr, SCALE: tl.constexpr, ROTATED: tl.constexpr,
    STAGES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the program's number and every so many on; its part of the scale's gradient goes to a line of ``partial``."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    _pass_over_rows(
        program, programs, grad, second, third, beside, x, scale, dx, partial + program * width, rows, inner_rows,
        grad_outer, grad_inner, second_outer, second_inner, third_outer, third_inner,
        beside_outer, beside_inner, x_outer, x_inner, dx_outer, dx_inner, cos, sin, heads,
        eps, width, INNER, PRODUCT, GRADS, BESIDE, SCALE, ROTATED, STAGES, TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def _heads_kernel(
    dq, dk, dv, projected, out, q_scale, k_scale, partial, cos, sin, tokens, q_heads, groups, value_heads, on_q, on_k,
    dq_token, dq_head, dk_token, dk_head, dv_token, dv_head,
    eps: tl.constexpr, width: tl.constexpr, value_width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    SCALE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, VALUE_TILE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs on queries, those on keys, and those that put values' gradients behind them."""
    program = tl.program_id(0)
    token = (q_heads + groups) * width + value_heads * value_width
    line = partial + program * width
    if program < on_q:
        _pass_over_rows(
            program, on_q, dq, dq, dq, dq, projected, q_scale, out, line, tokens * q_heads, q_heads,
            dq_token, dq_head, 0, 0, 0, 0, 0, 0, token, width, token, width, cos, sin, q_heads,
            eps, width, INNER, PRODUCT, 1, False, SCALE, True, 1, TILE, BLOCK,
        )  # fmt: skip
    elif program < on_q + on_k:
        behind = q_heads * width
        _pass_over_rows(
            program - on_q, on_k, dk, dk, dk, dk, projected + behind, k_scale, out + behind, line,
            tokens * groups, groups, dk_token, dk_head, 0, 0, 0, 0, 0, 0, token, width, token, width, cos, sin, groups,
            eps, width, INNER, PRODUCT, 1, False, SCALE, True, 1, TILE, BLOCK,
        )  # fmt: skip
    else:
        first, step = program - on_q - on_k, tl.num_programs(0) - on_q - on_k
        column = tl.arange(0, VALUE_BLOCK)[None, :]
        for start in range(first * VALUE_TILE, tokens * value_heads, step * VALUE_TILE):
            row = start + tl.arange(0, VALUE_TILE)[:, None]
            read = (column < value_width) & (row < tokens * value_heads)
            outer, inner = (row // value_heads).to(tl.int64), row % value_heads
            value = tl.load(dv + outer * dv_token + inner * dv_head + column, mask=read, other=0.0)
            place = outer * token + (q_heads + groups) * width + inner * value_width + column
            tl.store(out + place, value, mask=read)


@triton.jit
def _rotated_rows(
    first, step, x, scale, out, rows, heads, x_token, cos, sin,
    eps: tl.constexpr, width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of heads from ``first`` on, every ``step``, normed and rotated half by half; rounded no oftener than formulas."""
    column = tl.arange(0, BLOCK)[None, :]
    half = width // 2
    inside = column < half
    factor_1 = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    factor_2 = tl.load(scale + half + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(first * TILE, rows, step * TILE):
        row = start + tl.arange(0, TILE)[:, None]
        read = inside & (row < rows)
        token = (row // heads).to(tl.int64)
        given, angle = token * x_token + (row % heads) * width + column, token * width + column
        one = tl.load(x + given, mask=read, other=0.0).to(tl.float32)
        two = tl.load(x + given + half, mask=read, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(one * one + two * two, 1)[:, None] / width + eps)
        one = ((one * r).to(INNER).to(tl.float32) * factor_1).to(PRODUCT).to(out.dtype.element_ty).to(tl.float32)
        two = ((two * r).to(INNER).to(tl.float32) * factor_2).to(PRODUCT).to(out.dtype.element_ty).to(tl.float32)
        cos_1 = tl.load(cos + angle, mask=read, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + angle, mask=read, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + angle + half, mask=read, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + angle + half, mask=read, other=0.0).to(tl.float32)
        straight_1, turned_1 = (one * cos_1).to(out.dtype.element_ty), (two * sin_1).to(out.dtype.element_ty)
        straight_2, turned_2 = (two * cos_2).to(out.dtype.element_ty), (one * sin_2).to(out.dtype.element_ty)
        result_1 = straight_1.to(tl.float32) - turned_1.to(tl.float32)
        result_2 = straight_2.to(tl.float32) + turned_2.to(tl.float32)
        place = out + row.to(tl.int64) * width + column
        tl.store(place, result_1.to(out.dtype.element_ty), mask=read)
        tl.store(place + half, result_2.to(out.dtype.element_ty), mask=read)


@triton.jit
def _rotated_heads_kernel(
    projected, q_scale, k_scale, q, k, tokens, q_heads, groups, on_q, on_k, token, cos, sin,
    eps: tl.constexpr, width: tl.constexpr, INNER: tl.constexpr, PRODUCT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs on queries, and those on keys behind them."""
    program = tl.program_id(0)
    if program < on_q:
        _rotated_rows(
            program, on_q, projected, q_scale, q, tokens * q_heads, q_heads, token, cos, sin,
            eps, width, INNER, PRODUCT, TILE, BLOCK,
        )  # fmt: skip
    else:
        _rotated_rows(
            program - on_q, on_k, projected + q_heads * width, k_scale, k, tokens * groups, groups, token, cos, sin,
            eps, width, INNER, PRODUCT, TILE, BLOCK,
        )  # fmt: skip


@triton.jit
def _sum_kernel(partial, total, lines, more, width, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the first ``lines``, or of the ``more`` behind them, for the program's columns."""
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    found = tl.zeros([LINES, BLOCK], tl.float32)
    begin, end = part * lines, lines + part * more
    for start in range(begin, end, LINES):
        line = start + tl.arange(0, LINES)[:, None]
        found += tl.load(partial + line * width + column, mask=(line < end) & (column < width), other=0.0)
    result = tl.sum(found, 0)[None, :].to(total.dtype.element_ty)
    tl.store(total + part * width + column, result, mask=column < width)


@functools.cache
def _programs(device: torch.device) -> int:
    return _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: torch.Tensor, whole: bool) -> torch.Tensor:
    """As ``[outer, inner, D]``, where it lies if it can: heads are columns of a larger matrix unless tensors are ``whole``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, 1, x.shape[-1]) if whole else x.reshape(-1, *x.shape[-2:])


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
    dx = x.new_empty(x.shape)
    # What is not there is not read.
    read = [*[*grads, *grads[:1] * MOST_READERS][:MOST_READERS], x if beside is None else beside, x, dx]
    whole = x.ndim < 2 or all(each.is_contiguous() for each in read)
    *rows, written = (_rows(each, whole) for each in read)
    outer, middle, width = written.shape
    programs = _programs(x.device)
    constants = _constants(scale_D, eps, inner, width)
    ahead = [*grads, x, *([] if beside is None else [beside])]
    waiting = constants["TILE"] * constants["BLOCK"] * sum(each.element_size() for each in ahead)
    partial = x.new_empty((programs if wants_scale else 0, width), dtype=torch.float32)
    dscale_D = scale_D.new_empty(width if wants_scale else 0)
    torch.library.wrap_triton(_gradients_kernel)[(programs,)](
        *rows, scale_D.contiguous(), written, partial, outer * middle, middle,
        *(step for each in (*rows, written) for step in each.stride()[:2]),
        *(x if each is None else each.contiguous() for each in (cos, sin)), 1 if cos is None else x.shape[-2],
        width=width, GRADS=len(grads), BESIDE=beside is not None, SCALE=wants_scale, ROTATED=cos is not None,
        # Rotation reads too much to have two of it at a time.
        STAGES=2 if cos is None and waiting <= _WAITING else 1, **constants,
    )  # fmt: skip
    if wants_scale:
        torch.library.wrap_triton(_sum_kernel)[(triton.cdiv(width, _SUMMED), 1)](
            partial, dscale_D, programs, 0, width, LINES=_LINES, BLOCK=_SUMMED
        )
    return dx, dscale_D


def _constants(scale_D: torch.Tensor, eps: float, inner: torch.dtype, width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    types = {"INNER": _TYPES[inner], "PRODUCT": _TYPES[torch.promote_types(scale_D.dtype, inner)]}
    return types | {"eps": eps, "TILE": max(1, _ELEMENTS // block), "BLOCK": block, "num_warps": _WARPS}


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


@torch.library.triton_op("preftree::rotated_heads", mutates_args=())
def rotated_heads(
    projected_BSE: torch.Tensor,
    counts: list[int],
    q_scale_D: torch.Tensor,
    k_scale_D: torch.Tensor,
    eps: float,
    inner: torch.dtype,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `heads.rotated`."""
    (batch, length, wide), width = projected_BSE.shape, q_scale_D.shape[0]
    q_BSHD, k_BSGD = (projected_BSE.new_empty((batch, length, count, width)) for count in counts)
    on_q, on_k = (max(1, _programs(projected_BSE.device) * count // sum(counts)) for count in counts)
    torch.library.wrap_triton(_rotated_heads_kernel)[(on_q + on_k,)](
        projected_BSE.contiguous(), q_scale_D.contiguous(), k_scale_D.contiguous(), q_BSHD, k_BSGD, batch * length,
        *counts, on_q, on_k, wide, cos.contiguous(), sin.contiguous(),
        width=width, **_constants(q_scale_D, eps, inner, width // 2),
    )  # fmt: skip
    return q_BSHD, k_BSGD


def heads_gradients(
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
    """See `heads.gradients`. Launched at once: not for compilers to look into."""
    tokens, width, value_width = cos.numel() // cos.shape[-1], dq_BSHD.shape[-1], dv_BSGE.shape[-1]
    counts = [each.shape[2] for each in (dq_BSHD, dk_BSGD, dv_BSGE)]
    grads = [_rows(each, False) for each in (dq_BSHD, dk_BSGD, dv_BSGE)]
    on_q, on_k, on_v = (max(1, _programs(cos.device) * count // sum(counts)) for count in counts)
    result_BSE = torch.empty_like(projected_BSE, memory_format=torch.contiguous_format)
    partial = cos.new_empty((on_q + on_k if wants_scales else 0, width), dtype=torch.float32)
    dscales_2D = q_scale_D.new_empty((2, width if wants_scales else 0))
    value_block = triton.next_power_of_2(value_width)
    _heads_kernel[(on_q + on_k + on_v,)](
        *grads, projected_BSE.contiguous(), result_BSE, q_scale_D.contiguous(), k_scale_D.contiguous(), partial,
        cos.contiguous(), sin.contiguous(), tokens, *counts, on_q, on_k,
        *(step for each in grads for step in each.stride()[:2]),
        width=width, value_width=value_width, SCALE=wants_scales,
        VALUE_TILE=max(1, _ELEMENTS // value_block), VALUE_BLOCK=value_block,
        **_constants(q_scale_D, eps, inner, width),
    )  # fmt: skip
    if wants_scales:
        _sum_kernel[(triton.cdiv(width, _SUMMED), 2)](
            partial, dscales_2D, on_q, on_k, width, LINES=_LINES, BLOCK=_SUMMED
        )
    return result_BSE, dscales_2D
