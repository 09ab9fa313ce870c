"""A row as blocks of queries over the keys of their paths: what varlen kernels compute, and nothing more.

A block runs along first children as far as it can: a pair is two blocks, the prompt with the response that follows it,
and the other response. Each block's keys are its path from the root, then the block itself, so that within a block
attention is that of an ordinary sequence whose queries are its last ones ("bottom-right" causal). A row has as many blocks
as its trees have leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from preftree.packing import PackedRow

Interval = tuple[int, int]


@dataclass(frozen=True)
class QueryBlock:
    """Queries ``start`` to ``stop`` of a row and the intervals of nodes on the path above them, from the root down."""

    start: int
    stop: int
    above: tuple[Interval, ...]

    @property
    def depth(self) -> int:
        """Nodes on the path above: the position of the block's first query."""
        return sum(stop - start for start, stop in self.above)

    def keys(self, window: int | None = None) -> list[Interval]:
        """Intervals of the keys that some query of the block sees, its own tokens last."""
        hidden = 0 if window is None else max(self.depth - (window - 1), 0)
        intervals = []
        for start, stop in (*self.above, (self.start, self.stop)):
            cut = min(hidden, stop - start)
            hidden -= cut
            if cut < stop - start:
                intervals.append((start + cut, stop))
        return intervals


def query_blocks(runs: Sequence[tuple[int, int, int]]) -> list[QueryBlock]:
    """Blocks of a row's unbranched runs (`PackedRow.runs`), in the row's order."""
    blocks: list[QueryBlock] = []
    block_of: list[int] = []
    for index, (start, stop, before) in enumerate(runs):
        if before >= 0 and before == index - 1:
            last = blocks[-1]
            blocks[-1] = QueryBlock(last.start, stop, last.above)
        elif before >= 0:
            parent = blocks[block_of[before]]
            blocks.append(QueryBlock(start, stop, (*parent.above, (parent.start, runs[before][1]))))
        else:
            blocks.append(QueryBlock(start, stop, ()))
        block_of.append(len(blocks) - 1)
    return blocks


@dataclass(frozen=True)
class PathPlan:
    """The keys of all blocks one behind the other, and the way back from their gradients. Int32, on the row's device.

    Attributes:
        num_tokens: the row's tokens that are not padding: the blocks' queries.
        num_keys: keys of all blocks, ``K``.
        longest_queries, longest_keys: of a block.
        query_starts, key_starts: ``[blocks + 1]``, where each block's queries and keys begin.
        copies: ``[pieces, 3]``, ``(from, to, length)``: ``length`` nodes of the row, copied to the keys.
        sources: ``[parts, 4]``, ``(node, length, first, last)``: the gradient of ``length`` nodes is the sum of the pieces
            `origins` ``first`` to ``last``.
        origins: ``[..., 2]``, ``(offset, block)``: what to add to a node to find its copy, and whose key the copy is.
    """

    num_tokens: int
    num_keys: int
    longest_queries: int
    longest_keys: int
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    copies: torch.Tensor
    sources: torch.Tensor
    origins: torch.Tensor

    @property
    def in_place(self) -> bool:
        """Whether the keys are the row's own, in its order: no block has a path above it that it sees."""
        return self.num_keys == self.num_tokens


# Nodes that one program of the copying kernels handles at most.
TILE = 64


def plan_paths(row: PackedRow, window: int | None = None) -> PathPlan:
    """The row's plan; made once for each row and window, and sent to the row's device without waiting for it."""
    key = ("paths", window)
    if key not in row.derived:
        row.derived[key] = _plan(row, window)
    return row.derived[key]


def _plan(row: PackedRow, window: int | None) -> PathPlan:
    blocks = query_blocks(row.runs)
    keys = [block.keys(window) for block in blocks]
    pieces, at = [], 0
    for index, intervals in enumerate(keys):
        for start, stop in intervals:
            pieces.append((start, at, stop - start, index))
            at += stop - start
    query_starts = [0, *(block.stop for block in blocks)]
    key_starts = [0, *accumulate(sum(stop - start for start, stop in intervals) for intervals in keys)]
    copies = [
        (start + offset, to + offset, min(TILE, length - offset))
        for start, to, length, _ in pieces
        for offset in range(0, length, TILE)
    ]
    tables = (query_starts, key_starts, copies, *tables_of_sums(pieces))
    flat = [torch.tensor(table, dtype=torch.int32).flatten() for table in tables]
    packed = torch.cat(flat)
    if row.device.type == "cuda":
        packed = packed.pin_memory().to(row.device, non_blocking=True)
    sent = packed.split([table.numel() for table in flat])
    return PathPlan(
        num_tokens=row.num_tokens,
        num_keys=at,
        longest_queries=max((block.stop - block.start for block in blocks), default=0),
        longest_keys=max((stop - start for start, stop in pairwise(key_starts)), default=0),
        query_starts=sent[0],
        key_starts=sent[1],
        copies=sent[2].view(-1, 3),
        sources=sent[3].view(-1, 4),
        origins=sent[4].view(-1, 2),
    )


def tables_of_sums(pieces: Sequence[tuple[int, int, int, int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
    """`PathPlan.sources` and `PathPlan.origins` for pieces ``(from, to, length, block)`` that have been copied."""
    sources: list[tuple[int, ...]] = []
    origins: list[tuple[int, int]] = []
    for node, length, copied in _sum_up(pieces):
        first = len(origins)
        origins.extend(copied)
        sources.extend(
            (node + offset, min(TILE, length - offset), first, len(origins)) for offset in range(0, length, TILE)
        )
    return sources, origins


def _sum_up(pieces: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """``(node, length, copies)`` for stretches of nodes that have been copied by the same pieces."""
    opening: dict[int, list[int]] = {}
    closing: dict[int, list[int]] = {}
    for index, (start, _, length, _) in enumerate(pieces):
        opening.setdefault(start, []).append(index)
        closing.setdefault(start + length, []).append(index)
    borders = sorted(opening.keys() | closing.keys())
    parts: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    open_pieces: dict[int, tuple[int, int]] = {}
    for border, following in pairwise(borders):
        for index in closing.get(border, ()):
            del open_pieces[index]
        for index in opening.get(border, ()):
            start, to, _, block = pieces[index]
            open_pieces[index] = to - start, block
        if open_pieces:
            parts.append((border, following - border, tuple(open_pieces.values())))
    return parts
