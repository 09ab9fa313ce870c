"""Lists of the mask's blocks, as block-sparse kernels read them: made on the row's device, nothing read back to the host.

On a GPU one Triton kernel writes a list (`blocks_triton`); in torch it takes forty small ones, whose launches the host
would pay for in every row. `mask.visible_blocks` is what both must agree with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from preftree.attention.mask import CAUSAL, Rule, visible_blocks
from preftree.attention.paths import query_blocks
from preftree.kernels import kernels_of
from preftree.packing import PackedRow
from preftree.transfer import send

# The longest of the kernels' tiles: the last one reaches so far behind the row's end at most.
LAST_TILE = 192


class BlockLists(NamedTuple):
    """For each block of one side the blocks of the other that it has to do with, int32 on the row's device.

    Attributes:
        partial_counts, full_counts: ``[1, 1, N]``, how many of the list's entries count.
        partial_indices, full_indices: ``[1, 1, N, M]``, in order; partial blocks need the mask, full ones do not.
    """

    partial_counts: torch.Tensor
    partial_indices: torch.Tensor
    full_counts: torch.Tensor
    full_indices: torch.Tensor


def block_lists(some: torch.Tensor, everything: torch.Tensor) -> BlockLists:
    """Lists for each row of ``[N, M]`` blocks; of their transposes, for each column."""
    blocks = torch.stack((some & ~everything, everything))
    width = blocks.shape[-1]
    rank = blocks.cumsum(-1, dtype=torch.int32)
    counts = rank[..., -1].contiguous()
    # Each block that counts goes to its rank, the others to a column behind the list.
    target = torch.where(blocks, rank - 1, width).long()
    column = torch.arange(width, dtype=torch.int32, device=blocks.device).expand_as(target)
    indices = counts.new_zeros((*blocks.shape[:-1], width + 1)).scatter_(-1, target, column)[..., :width]
    partial, full = indices.contiguous()
    return BlockLists(counts[0][None, None], partial[None, None], counts[1][None, None], full[None, None])


def _filled_up(row: PackedRow) -> int:
    """How long a row's arrays are for kernels to read their last tile whole."""
    return len(row) + LAST_TILE + -len(row) % LAST_TILE


def nodes_of(row: PackedRow, rule: Rule) -> torch.Tensor:
    """`end`, positions and lowest visible positions of the row's nodes under a `known` rule.

    Returns:
        Int32 ``[3, S + ...]``, filled up so that kernels may read their last tile whole.
    """
    key = ("nodes", rule.key)
    if key not in row.derived:
        if (kernels := _triton_kernels(row, rule)) is not None:
            row.derived[key] = kernels.nodes_of(row, rule, _filled_up(row))
        else:
            nodes = torch.stack((row.end, row.position_ids, rule.lowest(row.position_ids))).to(torch.int32)
            row.derived[key] = torch.nn.functional.pad(nodes, (0, _filled_up(row) - len(row)))
    return row.derived[key]


def two_runs(row: PackedRow, rule: Rule) -> torch.Tensor | None:
    """Where the keys that each query sees under a `known` rule are two runs of nodes, as in every pair: these runs.

    Returns:
        Int32 ``[3, S + ...]``, filled up as `nodes_of` is: start and stop of the first run, start of the second, which ends
        with the query itself. None if some query's path is in more pieces.
    """
    key = ("two runs", rule.key)
    if key not in row.derived:
        row.derived[key] = _paths_in_two(row) if rule.causal else _seen_of_two(row, rule)
    return row.derived[key]


def _paths_in_two(row: PackedRow) -> torch.Tensor | None:
    blocks = query_blocks(row.runs)
    if any(len(block.above) > 1 for block in blocks):
        return None
    above = [block.above[0] if block.above else (block.start, block.start) for block in blocks]
    of_block = torch.tensor([(*run, block.start) for run, block in zip(above, blocks, strict=True)], dtype=torch.int32)
    lengths = torch.tensor([block.stop - block.start for block in blocks], dtype=torch.long)
    runs = torch.zeros(3, _filled_up(row), dtype=torch.int32)
    runs[2] = torch.arange(runs.shape[1])  # padding sees itself
    runs[:, : row.num_tokens] = of_block.view(-1, 3).repeat_interleave(lengths, 0).T
    (runs,) = send([runs], row.device)
    return runs


def _seen_of_two(row: PackedRow, rule: Rule) -> torch.Tensor | None:
    runs = two_runs(row, CAUSAL)
    if runs is None:
        return None
    # A run's positions follow each other: as many of its first keys are hidden as there are positions before the lowest.
    _, positions, lowest = nodes_of(row, rule)
    first, stop, second = runs
    hidden = [(lowest - positions[start]).clamp(min=0) for start in (first, second)]
    return torch.stack((torch.minimum(first + hidden[0], stop), stop, second + hidden[1]))


def key_lists(row: PackedRow, rule: Rule, query_block: int, key_block: int) -> BlockLists:
    """For each block of queries its blocks of keys: what a forward pass goes through."""
    if (kernels := _triton_kernels(row, rule)) is not None:
        return BlockLists(*kernels.key_lists(nodes_of(row, rule), len(row), not rule.causal, query_block, key_block))
    return block_lists(*visible_blocks(row, rule, query_block, key_block))


def query_lists(row: PackedRow, rule: Rule, query_block: int, key_block: int) -> BlockLists:
    """For each block of keys its blocks of queries: what a backward pass goes through."""
    if (kernels := _triton_kernels(row, rule)) is not None:
        return BlockLists(*kernels.query_lists(nodes_of(row, rule), len(row), not rule.causal, query_block, key_block))
    some, everything = visible_blocks(row, rule, query_block, key_block)
    return block_lists(some.T, everything.T)


def _triton_kernels(row: PackedRow, rule: Rule) -> Any:
    """The Triton kernels where they can serve, or None."""
    return kernels_of("preftree.attention.blocks_triton") if row.device.type == "cuda" and rule.known else None
