"""Triton kernels of `blocks`: one program for each block of one side, which goes through the blocks of the other.

The conditions are those of `mask.visible_blocks`, in its terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from preftree.attention.mask import Rule
from preftree.packing import PackedRow

# Entries that a program looks at together.
_ENTRIES = 4096
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _nodes_kernel(end, positions, nodes, size, length, window, chunk, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    position = tl.load(positions + token, mask=inside, other=0).to(tl.int32)
    lowest = tl.zeros([BLOCK], tl.int32)
    if window > 0:
        lowest = tl.maximum(position - (window - 1), 0)
    if chunk > 0:
        lowest = position // chunk * chunk
    tl.store(nodes + token, tl.load(end + token, mask=inside, other=0).to(tl.int32), mask=token < length)
    tl.store(nodes + length + token, position, mask=token < length)
    tl.store(nodes + 2 * length + token, lowest, mask=token < length)


@triton.jit
def _nearest_kernel(lowest, nearest, size, QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """Running minimum of `lowest` within each query block."""
    offset = tl.arange(0, QUERIES)
    token = tl.program_id(0) * QUERY_BLOCK + offset
    inside = (offset < QUERY_BLOCK) & (token < size)
    values = tl.load(lowest + token, mask=inside, other=_FAR)
    tl.store(nearest + token, tl.associative_scan(values, 0, _smaller), mask=inside)


@triton.jit
def _append(indices, count, chosen, blocks):
    """Write the chosen blocks behind the ``count`` that the list has; the list's new length."""
    ones = chosen.to(tl.int32)
    tl.store(indices + count + tl.cumsum(ones, 0) - 1, blocks, mask=chosen)
    return count + tl.sum(ones, 0)


@triton.jit
def _reached(nearest, end, position, inside, first, last):
    """Keys on the path of, and seen by, a query of the block ``first`` to ``last`` that they stand before."""
    below = tl.minimum(end, last)
    seen = inside & (below > first)
    return seen & (tl.load(nearest + below - 1, mask=seen, other=_FAR) <= position)


@triton.jit
def _key_lists_kernel(
    nodes, nearest, counts, indices, size, length, number, width, FROM_LOWEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = row * QUERY_BLOCK
    last = first + QUERY_BLOCK
    lowest_max = 0
    if FROM_LOWEST:
        query = first + tl.arange(0, QUERIES)
        within = (query < last) & (query < size)
        lowest_max = tl.max(tl.load(nodes + 2 * length + query, mask=within, other=0), 0)
    offset = tl.arange(0, KEYS)[None, :]
    partial_count = 0
    full_count = 0
    # Blocks behind the last query hold no visible key.
    for start in range(0, tl.minimum(tl.cdiv(last, KEY_BLOCK), width), BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        key = block[:, None] * KEY_BLOCK + offset
        inside = (offset < KEY_BLOCK) & (key < size)
        end = tl.load(nodes + key, mask=inside, other=0)
        end_min = tl.min(tl.where(inside, end, _FAR), 1)
        key_first = block * KEY_BLOCK
        key_last = key_first + KEY_BLOCK
        before = key_last <= first
        reached = before & (tl.max(end, 1) > first)
        full = (key_last <= first + 1) & (end_min >= last) & (block < width)
        if FROM_LOWEST:
            position = tl.load(nodes + length + key, mask=inside, other=_FAR)
            full = full & (tl.min(position, 1) >= lowest_max)
            seen = _reached(nearest, end, position, inside, first, last)
            reached = before & (tl.max(seen.to(tl.int32), 1) > 0)
        some = (reached | ((key_first < last) & (key_last > first))) & (block < width)
        partial_count = _append(indices + row * width, partial_count, some & ~full, block)
        full_count = _append(indices + (number + row) * width, full_count, full, block)
    tl.store(counts + row, partial_count)
    tl.store(counts + number + row, full_count)


@triton.jit
def _query_lists_kernel(
    nodes, nearest, counts, indices, size, length, number, width, FROM_LOWEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    key_first = row * KEY_BLOCK
    key_last = key_first + KEY_BLOCK
    key = key_first + tl.arange(0, KEYS)
    inside = (key < key_last) & (key < size)
    end = tl.load(nodes + key, mask=inside, other=0)
    end_max = tl.max(end, 0)
    end_min = tl.min(tl.where(inside, end, _FAR), 0)
    position = tl.load(nodes + length + key, mask=inside, other=_FAR)
    position_min = tl.min(position, 0)
    offset = tl.arange(0, QUERIES)[None, :]
    partial_count = 0
    full_count = 0
    # Blocks before the first key hold no query that sees one, blocks behind the keys' descendants neither.
    begin = key_first // QUERY_BLOCK
    for start in range(begin, tl.minimum(tl.cdiv(tl.maximum(end_max, key_last), QUERY_BLOCK), width), BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        first = block * QUERY_BLOCK
        last = first + QUERY_BLOCK
        before = key_last <= first
        reached = before & (end_max > first)
        full = (key_last <= first + 1) & (end_min >= last) & (block < width)
        if FROM_LOWEST:
            query = first[:, None] + offset
            lowest = tl.load(nodes + 2 * length + query, mask=(offset < QUERY_BLOCK) & (query < size), other=0)
            full = full & (position_min >= tl.max(lowest, 1))
            seen = _reached(nearest, end[None, :], position[None, :], inside[None, :], first[:, None], last[:, None])
            reached = before & (tl.max(seen.to(tl.int32), 1) > 0)
        some = (reached | ((key_first < last) & (key_last > first))) & (block < width)
        partial_count = _append(indices + row * width, partial_count, some & ~full, block)
        full_count = _append(indices + (number + row) * width, full_count, full, block)
    tl.store(counts + row, partial_count)
    tl.store(counts + number + row, full_count)


def nodes_of(row: PackedRow, rule: Rule, length: int) -> torch.Tensor:
    """Int32 ``[3, length]``, see `blocks.nodes_of`."""
    size = len(row)
    nodes = torch.empty(3, length, dtype=torch.int32, device=row.device)
    grid = (triton.cdiv(length, 1024),)
    _nodes_kernel[grid](
        row.end, row.position_ids, nodes, size, length, rule.window or 0, rule.chunk or 0, BLOCK=1024
    )  # fmt: skip
    return nodes


def key_lists(
    nodes: torch.Tensor, size: int, from_lowest: bool, query_block: int, key_block: int
) -> tuple[torch.Tensor, ...]:
    """`BlockLists` of query blocks."""
    return _lists(_key_lists_kernel, nodes, size, from_lowest, query_block, key_block, by_query=True)


def query_lists(
    nodes: torch.Tensor, size: int, from_lowest: bool, query_block: int, key_block: int
) -> tuple[torch.Tensor, ...]:
    """`BlockLists` of key blocks."""
    return _lists(_query_lists_kernel, nodes, size, from_lowest, query_block, key_block, by_query=False)


def _lists(kernel, nodes, size, from_lowest, query_block, key_block, by_query) -> tuple[torch.Tensor, ...]:
    queries, keys = triton.cdiv(size, query_block), triton.cdiv(size, key_block)
    number, width = (queries, keys) if by_query else (keys, queries)
    shapes = {
        "QUERY_BLOCK": query_block,
        "KEY_BLOCK": key_block,
        "QUERIES": triton.next_power_of_2(query_block),
        "KEYS": triton.next_power_of_2(key_block),
    }
    nearest = nodes[2]
    if from_lowest:
        nearest = torch.empty(size, dtype=torch.int32, device=nodes.device)
        _nearest_kernel[(queries,)](nodes[2], nearest, size, QUERY_BLOCK=query_block, QUERIES=shapes["QUERIES"])
    counts = torch.empty(2, 1, 1, number, dtype=torch.int32, device=nodes.device)
    indices = torch.zeros(2, 1, 1, number, width, dtype=torch.int32, device=nodes.device)
    together = max(_ENTRIES // max(shapes["KEYS"], shapes["QUERIES"]), 1)
    kernel[(number,)](
        nodes, nearest, counts, indices, size, nodes.shape[1], number, width,
        FROM_LOWEST=from_lowest, BLOCKS=together, **shapes,
    )  # fmt: skip
    return counts[0], indices[0], counts[1], indices[1]
