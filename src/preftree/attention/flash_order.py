"""The order in which FlashAttention-4's backward kernel takes key blocks and heads.

As it comes, it takes all key blocks of a row for one head, then for the next. Trees are shorter than rows, so key blocks
that run together work on different queries, and the heads of one token, which lie side by side in memory, are read far
apart in time. Eight heads of a key block next to each other took up to a quarter off the kernel's time on an H100 and
cost nothing on a row of one long tree; all heads at once no longer fit the cache there.

Importing this module needs flash-attn-4.
"""

# No `from __future__ import annotations`: CuTe DSL reads annotations as they are.

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from flash_attn.cute.tile_scheduler import SingleTileScheduler, WorkTileInfo

_MOST_HEADS = 8


class HeadsTogether(SingleTileScheduler):
    """One work tile a block, as its base; some heads are the fastest dimension of the grid, key blocks the next."""

    @staticmethod
    def create(params, ctx=None, *, loc=None, ip=None):
        return HeadsTogether(params, cute.arch.block_idx(), loc=loc, ip=ip)

    @staticmethod
    def get_grid_shape(params, *, loc=None, ip=None):
        # The largest power of two that divides the number of heads, up to the limit.
        together = cutlass.min(params.num_head & -params.num_head, _MOST_HEADS)
        return together, params.num_block, params.num_head // together * params.num_batch

    def get_current_work(self, *, loc=None, ip=None):
        within, block, section = self._blk_coord
        together = cute.arch.grid_dim()[0]
        sections = self.params.num_head // together
        head = section % sections * together + within
        return WorkTileInfo((block, head, section // sections, Int32(0)), self._is_first_block)

    def __new_from_mlir_values__(self, values):
        parts = []
        for part, count in zip((self.params, self._blk_coord), self._values_pos, strict=True):
            parts.append(cutlass.new_from_mlir_values(part, values[:count]))
            values = values[count:]
        scheduler = HeadsTogether(*parts, loc=self._loc)
        scheduler._is_first_block = self._is_first_block
        return scheduler
