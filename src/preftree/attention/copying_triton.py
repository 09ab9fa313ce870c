"""Triton kernels of `copying`: contiguous pieces of rows ``[N, G, D]``, no atomic additions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements that a program moves at once.
_BLOCK = 4096


@triton.jit
def _copy_kernel(x, y, copies, stride_x, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    piece = copies + tl.program_id(0) * 3
    start, to, length = tl.load(piece).to(tl.int64), tl.load(piece + 1).to(tl.int64), tl.load(piece + 2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < width)[None, :]
    values = tl.load(x + (start + row)[:, None] * stride_x + column[None, :], mask=inside)
    tl.store(y + (to + row)[:, None] * width + column[None, :], values, mask=inside)


@triton.jit
def _sum_kernel(x, y, sources, origins, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    source = sources + tl.program_id(0) * 4
    node, length = tl.load(source).to(tl.int64), tl.load(source + 1)
    first_origin, last_origin = tl.load(source + 2), tl.load(source + 3)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < width)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for origin in range(first_origin, last_origin):
        at = node + tl.load(origins + origin) + row
        total += tl.load(x + at[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (node + row)[:, None] * width + column[None, :], total.to(y.dtype.element_ty), mask=inside)


def _launch(x: torch.Tensor, count: int, tile: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and shape of programs for ``count`` entries of up to ``tile`` rows ``[N, G, D]``."""
    width = x[0].numel()
    columns = min(triton.next_power_of_2(width), 1024)
    rows = min(_BLOCK // columns, tile)
    return (count, tile // rows, triton.cdiv(width, columns)), {"ROWS": rows, "WIDTH": columns}


def copy(x: torch.Tensor, y: torch.Tensor, copies: torch.Tensor, tile: int) -> None:
    """Entries ``(from, to, length)`` of ``x`` ``[N, G, D]`` to ``y``."""
    if not x[0].is_contiguous():
        x = x.contiguous()
    grid, shape = _launch(x, len(copies), tile)
    _copy_kernel[grid](x, y, copies, x.stride(0), x[0].numel(), **shape)


def sum_up(x: torch.Tensor, y: torch.Tensor, sources: torch.Tensor, origins: torch.Tensor, tile: int) -> None:
    """Entries ``(node, length, first, last)`` of ``y`` from their copies in ``x``, summed in float32."""
    grid, shape = _launch(x, len(sources), tile)
    _sum_kernel[grid](x, y, sources, origins, x[0].numel(), **shape)
