"""Triton kernels of `copying`: contiguous pieces of rows ``[N, G, D]``, no atomic additions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preftree.attention.fa4 import TiledSums

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
        at = node + tl.load(origins + origin * 2) + row
        total += tl.load(x + at[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (node + row)[:, None] * width + column[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum_tiles_kernel(
    sums, order, y, sources, origins, key_starts, scale, stride_sums, groups, size,
    TILE: tl.constexpr, STEP: tl.constexpr, LINE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    source = sources + tl.program_id(0) * 4
    node, length = tl.load(source).to(tl.int64), tl.load(source + 1)
    first_origin, last_origin = tl.load(source + 2), tl.load(source + 3)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < size)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for origin in range(first_origin, last_origin):
        block = tl.load(origins + origin * 2 + 1)
        start = tl.load(key_starts + block)
        key = node + tl.load(origins + origin * 2) + row - start
        line = (start + block * STEP) // STEP * STEP + key // TILE * TILE
        place = tl.load(order + (key % TILE)[:, None] * size + column[None, :], mask=inside, other=0)
        at = group * stride_sums + line[:, None] * LINE + place
        total += tl.load(sums + at, mask=inside, other=0.0)
    at = ((node + row)[:, None] * groups + group) * size + column[None, :]
    tl.store(y + at, (total * scale).to(y.dtype.element_ty), mask=inside)


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


def sum_up_tiles(tiled: TiledSums, y: torch.Tensor, sources: torch.Tensor, origins: torch.Tensor,
                 key_starts: torch.Tensor, tile: int) -> None:  # fmt: skip
    """Like `sum_up`, from the float32 sums of a kernel that has them in tiles."""
    groups, size = y.shape[1:]
    width = triton.next_power_of_2(size)
    rows = min(_BLOCK // width, tile)
    _sum_tiles_kernel[(len(sources), tile // rows, groups)](
        tiled.sums, tiled.order, y, sources, origins, key_starts, tiled.scale, tiled.sums.stride(0), groups, size,
        TILE=len(tiled.order), STEP=tiled.step, LINE=tiled.line, ROWS=rows, WIDTH=width,
    )  # fmt: skip
