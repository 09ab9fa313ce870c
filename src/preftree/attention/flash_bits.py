"""The tree's rule as runs of bits, in the place of FlashAttention-4's masks on Hopper.

The kernels ask a mask about each entry of a block by itself: two comparisons, a load for each key, and as many choices. But
the queries that see a key follow each other, and so do the keys that a query of a shallow tree sees, but for one gap. A
thread holds some 32 entries of a key or query: which of them are seen is one number, made of where the runs begin and end,
whose bits the processor moves to predicates by itself. A partial block takes hardly more instructions than a full one then.

Importing this module needs flash-attn-4.
"""

# No `from __future__ import annotations`: CuTe DSL reads annotations as they are.

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from flash_attn.cute.mask import AttentionMask, mask_r2p_lambda, r2p_bitmask_above, r2p_bitmask_below
from quack import layout_utils

from preftree.attention.flash_mask import load, tree_mask, tree_mask_of_two


def _in_pairs(entries) -> bool:
    """Whether a thread's entries stand at 0, 1, 8, 9, 16, 17, ... of a block's line, which `_entries_before` counts."""
    return all(entry[1] == place // 2 * 8 + place % 2 for place, entry in enumerate(entries))


@cute.jit
def _entries_before(place: Int32, size: cutlass.Constexpr[int]):
    inside = cutlass.min(cutlass.max(place, 0), size)
    return inside // 8 * 2 + cutlass.min(inside % 8, 2)


@cute.jit
def _keep(entries, start, stop):
    """Entries ``start`` to ``stop`` as they are, -inf for the others."""
    mask_r2p_lambda(entries, lambda s: r2p_bitmask_above(start, s) & r2p_bitmask_below(stop, s), rank1=True)


@cute.jit
def _keep_two(entries, start, stop, again, end):
    """Those of two runs."""
    mask_r2p_lambda(
        entries,
        lambda s: (
            (r2p_bitmask_above(start, s) & r2p_bitmask_below(stop, s))
            | (r2p_bitmask_above(again, s) & r2p_bitmask_below(end, s))
        ),
        rank1=True,
    )


@dataclass(frozen=True)
class TreeMask(AttentionMask):
    """As its base, but for the tree's rule: `tree_mask` by keys where blocks lie transposed, `tree_mask_of_two` by queries."""

    @cute.jit
    def apply_mask(
        self,
        acc_S,
        batch_idx,
        head_idx,
        m_block,
        n_block,
        thr_mma,
        mask_seqlen: cutlass.Constexpr[bool],
        mask_causal: cutlass.Constexpr[bool],
        mask_local: cutlass.Constexpr[bool] = False,
        mask_mod: cutlass.Constexpr = None,
        aux_data=None,
        fastdiv_mods=(None, None),
    ) -> None:
        shape = (self.tile_n, self.tile_m) if const_expr(self.swap_AB) else (self.tile_m, self.tile_n)
        places = cute.make_identity_tensor(shape)
        # [queries, keys] of this thread; those of the first thread are known when this is compiled.
        own = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(places), transpose=self.swap_AB)
        known = layout_utils.reshape_acc_to_mn(thr_mma.get_slice(0).partition_C(places), transpose=self.swap_AB)
        scores = layout_utils.reshape_acc_to_mn(acc_S, transpose=self.swap_AB)
        queries, keys = const_expr(cute.size(scores.shape[0])), const_expr(cute.size(scores.shape[1]))
        by_keys = mask_mod is tree_mask and self.swap_AB and _in_pairs([known[r, 0] for r in range(queries)])
        by_queries = mask_mod is tree_mask_of_two and not self.swap_AB and _in_pairs([known[0, c] for c in range(keys)])
        if const_expr(by_keys):
            query = m_block * self.tile_m + own[0, 0][1]
            for c in cutlass.range_constexpr(keys):
                key = n_block * self.tile_n + own[0, c][0]
                start = _entries_before(key - query, self.tile_m)
                stop = _entries_before(load(aux_data.scalars[0], key) - query, self.tile_m)
                _keep(scores[None, c], start, stop)
        elif const_expr(by_queries and self.qhead_per_kvhead_packgqa == 1):
            key = n_block * self.tile_n + own[0, 0][1]
            for r in cutlass.range_constexpr(queries):
                query = m_block * self.tile_m + own[r, 0][0]
                start, stop, again = (
                    _entries_before(load(array, query) - key, self.tile_n) for array in aux_data.scalars
                )
                _keep_two(scores[r, None], start, stop, again, _entries_before(query + 1 - key, self.tile_n))
        else:
            AttentionMask.apply_mask(
                self,
                acc_S,
                batch_idx,
                head_idx,
                m_block,
                n_block,
                thr_mma,
                mask_seqlen,
                mask_causal,
                mask_local,
                mask_mod,
                aux_data,
                fastdiv_mods,
            )
