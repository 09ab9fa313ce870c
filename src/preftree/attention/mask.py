"""Which keys a query sees: the tree's rule, a family's rule on logical positions, and blocks of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from preftree.packing import PackedRow

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Entries of the largest temporary that a window's blocks are made from.
_MOST_ENTRIES = 1 << 25


@dataclass(frozen=True)
class Rule:
    """A model family's own rule within one sequence (causal, sliding window, chunks, ...).

    Attributes:
        function: ``(batch, head, query position, key position) -> bool``, broadcasting over integer tensors, as
            transformers' mask functions are. It is asked about positions in the sequence, never about row indices.
        causal: the rule is plain causal attention, which the tree's own rule already implies.
        window: the rule is causal and a query sees this many positions, its own included; or None.
        chunk: the rule is causal within chunks of this many positions, counted from 0; or None.
        reach: keys this many positions back or more are never visible, or None. Known for more rules than the others.
        nodes: the rule asked about nodes of the row that it was made for, in place of positions: one that depends on what
            the tokens are (image tokens that see each other in both directions). None for all others.
    """

    function: MaskFunction
    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    reach: int | None = None
    nodes: MaskFunction | None = None

    @property
    def known(self) -> bool:
        """Whether `lowest` says all that the rule adds to the tree's; kernels can do without `function` then."""
        return self.causal or self.window is not None or self.chunk is not None

    @property
    def key(self) -> tuple:
        """Equal for rules that hide the same keys: what is made for one row and a known rule can be used again."""
        return ("known", self.window, self.chunk) if self.known else ("function", id(self.function))

    def lowest(self, positions: torch.Tensor) -> torch.Tensor:
        """The first position that a query at each of ``positions`` sees: key ``k`` is visible iff not before it."""
        if self.window is not None:
            return (positions - (self.window - 1)).clamp(min=0)
        if self.chunk is not None:
            return positions // self.chunk * self.chunk
        if self.causal:
            return torch.zeros_like(positions)
        raise ValueError("a rule known by its function alone has no lowest visible position")

    def __call__(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Bool ``[Q, K]`` for positions ``[Q]`` and ``[K]``."""
        zero = query_positions.new_zeros((1, 1))
        visible = self.function(zero, zero, query_positions[:, None], key_positions[None, :])
        return visible.expand(len(query_positions), len(key_positions))


CAUSAL = Rule(lambda batch, head, query, key: key <= query, causal=True)


def sliding_window(window: int) -> Rule:
    """Causal attention to the last ``window`` positions, the query's own included."""
    return Rule(lambda b, h, q, k: (k <= q) & (k > q - window), window=window, reach=window)


def chunks(chunk: int) -> Rule:
    """Causal attention within chunks of ``chunk`` positions."""
    return Rule(lambda b, h, q, k: (k <= q) & (k // chunk == q // chunk), chunk=chunk, reach=chunk)


def visible_nodes(row: PackedRow, rule: Rule = CAUSAL) -> torch.Tensor:
    """The specification: bool ``[S, S]``, query ``q`` by key ``k``, ``k <= q < end[k]`` and the family's rule.

    Under a rule that knows nodes (`Rule.nodes`) a key may also lie behind the query: on one path with it either way.
    """
    node = torch.arange(len(row), device=row.device)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < row.end[None, :])
    if rule.nodes is not None:
        zero = node.new_zeros((1, 1))
        return (visible | visible.T) & rule.nodes(zero, zero, node[:, None], node[None, :])
    return visible if rule.causal else visible & rule(row.position_ids, row.position_ids)


def visible_blocks(
    row: PackedRow, rule: Rule, query_block: int, key_block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of the mask from their extremes, never from all ``S^2`` entries; nothing is read back to the host.

    A key block that stands before the query block has a visible pair iff its largest `end` lies behind the first query,
    and is visible throughout iff its smallest `end` does not lie before the last query. Under a window a key must also
    not lie before what one of its own queries sees: the queries below key ``k`` in a block are the first ones up to
    ``end[k]``, so the smallest `Rule.lowest` among them is a running minimum, ``S`` comparisons for each query block.

    Args:
        row: the row.
        rule: the family's rule.
        query_block, key_block: tokens of a block; ``key_block`` is ``query_block`` unless given.

    Returns:
        ``(some, all)``, bool ``[query blocks, key blocks]``: anything visible, everything visible (never where the row's
        end cuts a block). Both exact if the rule is `known`; otherwise ``some`` may hold blocks that the rule empties,
        and ``all`` holds none.
    """
    key_block = query_block if key_block is None else key_block
    size, device = len(row), row.device
    first = torch.arange(0, size, query_block, device=device)[:, None]
    last = first + query_block
    key_first = torch.arange(0, size, key_block, device=device)[None, :]
    key_last = key_first + key_block
    end_min, end_max = _extremes(row.end, key_block)
    before = key_last <= first
    # Blocks that share tokens hold the pairs of a token and itself.
    some = (before & (end_max > first)) | ((key_first < last) & (key_last > first))
    everything = (key_last <= first + 1) & (end_min >= last)
    if rule.causal:
        return some, everything
    position_min, position_max = _extremes(row.position_ids, key_block)
    if not rule.known:
        if rule.nodes is not None:
            some |= visible_blocks(row, CAUSAL, key_block, query_block)[0].T
        if rule.reach is not None:
            nearest, _ = _extremes(row.position_ids, query_block)
            some &= nearest[:, None] - position_max < rule.reach
        return some, torch.zeros_like(everything)
    lowest = rule.lowest(row.position_ids)
    _, lowest_max = _extremes(lowest, query_block)
    everything &= position_min >= lowest_max[:, None]
    some &= ~before | _reached(row, lowest, query_block, key_block)
    return some, everything


def _extremes(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each block; the last block is filled up with its last value."""
    blocks = _cut(values, block)
    return blocks.amin(1), blocks.amax(1)


def _cut(values: torch.Tensor, block: int) -> torch.Tensor:
    missing = -values.numel() % block
    return torch.cat((values, values[-1:].expand(missing))).view(-1, block) if missing else values.view(-1, block)


def _reached(row: PackedRow, lowest: torch.Tensor, query_block: int, key_block: int) -> torch.Tensor:
    """Bool ``[query blocks, key blocks]``: a key before the query block is on the path of, and seen by, one of its queries."""
    nearest = _cut(lowest, query_block).cummin(1).values.flatten()
    end, positions = row.end[None, :], row.position_ids[None, :]
    first = torch.arange(0, len(row), query_block, device=row.device)[:, None]
    reached = []
    for queries in first.split(max(_MOST_ENTRIES // len(row), 1)):
        below = torch.minimum(end, queries + query_block)
        seen = (below > queries) & (nearest[torch.maximum(below, queries + 1) - 1] <= positions)
        missing = -len(row) % key_block
        seen = torch.nn.functional.pad(seen, (0, missing)) if missing else seen
        reached.append(seen.view(len(queries), -1, key_block).any(-1))
    return torch.cat(reached)
