"""Which keys a query sees: the tree's rule, a family's rule on logical positions, and block masks of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from preftree.packing import PackedRow

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A model family's own rule within one sequence (causal, sliding window, chunks, ...).

    Attributes:
        function: ``(batch, head, query position, key position) -> bool``, broadcasting over integer tensors, as
            transformers' mask functions are. It is asked about positions in the sequence, never about row indices.
        causal: the rule is plain causal attention, which the tree's own rule already implies.
        reach: keys this many positions back or more are never visible (the size of a window or chunk), or None.
    """

    function: MaskFunction
    causal: bool = False
    reach: int | None = None

    def __call__(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Bool ``[Q, K]`` for positions ``[Q]`` and ``[K]``."""
        zero = query_positions.new_zeros((1, 1))
        visible = self.function(zero, zero, query_positions[:, None], key_positions[None, :])
        return visible.expand(len(query_positions), len(key_positions))


CAUSAL = Rule(lambda batch, head, query, key: key <= query, causal=True)


def visible_nodes(row: PackedRow, rule: Rule = CAUSAL) -> torch.Tensor:
    """The specification: bool ``[S, S]``, query ``q`` by key ``k``, ``k <= q < end[k]`` and the family's rule."""
    node = torch.arange(len(row), device=row.device)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < row.end[None, :])
    return visible if rule.causal else visible & rule(row.position_ids, row.position_ids)


def visible_blocks(row: PackedRow, rule: Rule, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of the mask, from each block's extremes alone: ``O(blocks^2)`` comparisons, never ``S^2``.

    A key block left of the query block has a visible pair iff its largest `end` lies behind the first query, and is
    visible throughout iff its smallest `end` does not lie before the last query.

    Returns:
        ``(some, all)``, bool ``[query blocks, key blocks]``: anything visible, everything visible. For a rule other
        than plain causal, ``some`` may hold blocks that the rule empties, and ``all`` holds none.
    """
    size = len(row)
    blocks = -(-size // block)
    padded = blocks * block

    def extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        filled = torch.cat((values, values[-1:].expand(padded - size))).view(blocks, block)
        return filled.amin(1), filled.amax(1)

    first = torch.arange(0, padded, block, device=row.device)
    index = torch.arange(blocks, device=row.device)
    end_min, end_max = extremes(row.end)
    left = index[None, :] < index[:, None]
    some = (left & (end_max[None, :] > first[:, None])) | (index[None, :] == index[:, None])
    last_query = first + block  # one past it; beyond the row for a block that the row's end cuts, hence never `all`
    everything = left & (end_min[None, :] >= last_query[:, None])
    if not rule.causal:
        everything = torch.zeros_like(everything)
        if rule.reach is not None:
            position_min, position_max = extremes(row.position_ids)
            some &= position_min[:, None] - position_max[None, :] < rule.reach
    return some, everything
