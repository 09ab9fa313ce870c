"""Tree attention through FlashAttention-4's block-sparse kernels, which the tree's rule is compiled into.

FlexAttention's `BACKEND="FLASH"` calls the same kernels. Called directly they serve every row length with one compiled
kernel, take the rule in a cheaper form (`flash_mask`), and leave out what FlexAttention does on the host for each call.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from preftree.attention import fa4, trial
from preftree.attention.blocks import BlockLists, key_lists, nodes_of, query_lists, two_runs
from preftree.attention.flash_parts import masks_are_own, own_parts
from preftree.attention.layer import Layer
from preftree.attention.mask import Rule
from preftree.attention.passes import Gradients, differentiable
from preftree.attention.scores import Scores
from preftree.attention.trial import kind_of
from preftree.packing import PackedRow


def refusal(layer: Layer) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if not layer.rule.known:
        return "the family's mask is neither causal nor a sliding window nor chunks, which is all its kernels are given"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass adds up in no fixed order, and deterministic algorithms are asked for"
    # Blackwell's kernels want other blocks, which nobody has measured here.
    return fa4.refusal(layer, capabilities=(9,))


def block_sizes(size: int, value_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Query and key tokens of a block, in the forward and in the backward pass: what the kernels' tiles go with."""
    if size <= 64:
        return (192, 128), (128, 128)
    if size <= 96:
        return (192, 128), (64, 128)
    if size <= 128:
        return (128, 128), (64, 128)
    if size <= 192:
        return (128, 128 if value_size <= 128 else 112), (64, 96)
    return (128, 80), (64, 64)


def bind(row: PackedRow, rule: Rule):
    """Attention by FlashAttention-4 on this row; made for long rows, at its best from some thousand tokens on."""
    return _OnRow(row, rule)


class _OnRow:
    """Attention bound to a row; ``bits`` says whether the kernels' masks are `flash_bits`, None that this is to be tried."""

    def __init__(self, row: PackedRow, rule: Rule, bits: bool | None = None):
        self.row, self.rule, self.bits = row, rule, bits

    def __call__(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> torch.Tensor:
        return differentiable(self, q_BHSD, k_BGSD, v_BGSE, scores)

    def forward(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        bits, mask, _ = self._masks(q_BHSD, k_BGSD, v_BGSE)
        value_size = v_BGSE.shape[-1]
        q_BHSD, k_BGSD, v_BGSE = fa4.widened(q_BHSD, k_BGSD, v_BGSE)
        with own_parts(bits):
            out_BSHE, lse_BHS, *_ = fa4.kernels()._flash_attn_fwd(
                q_BHSD.transpose(1, 2),
                k_BGSD.transpose(1, 2),
                v_BGSE.transpose(1, 2),
                softmax_scale=scores.scale,
                learnable_sink=scores.sinks,
                pack_gqa=False,
                return_lse=True,
                **fa4.capping(scores.softcap),
                **mask,
            )
        return fa4.narrowed(out_BSHE.transpose(1, 2), value_size), lse_BHS

    def backward(self, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores: Scores) -> Gradients:
        bits, _, mask = self._masks(q_BHSD, k_BGSD, v_BGSE)
        size, value_size = q_BHSD.shape[-1], v_BGSE.shape[-1]
        grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE = fa4.widened(grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE)
        with own_parts(bits):
            dq_BSHD, dk_BSGD, dv_BSGE, *dsinks = fa4.kernels()._flash_attn_bwd(
                q_BHSD.transpose(1, 2),
                k_BGSD.transpose(1, 2),
                v_BGSE.transpose(1, 2),
                out_BHSE.transpose(1, 2),
                grad_BHSE.transpose(1, 2),
                lse_BHS,
                softmax_scale=scores.scale,
                learnable_sink=scores.sinks,
                **fa4.capping(scores.softcap, backward=True),
                **mask,
            )
        dsinks_H = None if scores.sinks is None else dsinks[0]
        dq_BHSD, dk_BGSD = (fa4.narrowed(x.transpose(1, 2), size) for x in (dq_BSHD, dk_BSGD))
        return dq_BHSD, dk_BGSD, fa4.narrowed(dv_BSGE.transpose(1, 2), value_size), dsinks_H, None

    def _masks(
        self, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor
    ) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        """Whether by bits, and `_mask` of the forward and of the backward pass; made once for layers of a kind."""
        row, rule = self.row, self.rule
        batch, (heads, size), (groups, value_size) = len(q_BHSD), q_BHSD.shape[1::2], v_BGSE.shape[1::2]
        key = ("flash masks", rule.key, q_BHSD.dtype, batch, heads, groups, size, value_size)
        if key not in row.derived:
            from preftree.attention import flash_mask

            bits = self.bits
            if bits is None:
                bits = _takes_bits(kind_of(Layer.of(q_BHSD, k_BGSD, v_BGSE, rule, Scores(1.0))), q_BHSD.device)
            if bits is None:
                raise NotImplementedError(
                    "flash-attn-4 computes wrong for this layer: use the backend 'auto' or 'varlen'"
                )
            size, value_size = fa4.whole_size(size), fa4.whole_size(value_size)
            nodes, runs = nodes_of(row, rule), two_runs(row, rule) if bits else None
            tree_mask = flash_mask.tree_mask if bits else flash_mask.tree_mask_by_entry
            by_keys = (tree_mask, nodes[:1]) if rule.causal else (flash_mask.tree_mask_from, nodes)
            by_queries = by_keys if runs is None else (flash_mask.tree_mask_of_two, runs)
            # Blocks of the backward kernels lie transposed in registers, but for large heads.
            backward = by_keys if size <= 128 else by_queries
            first, second = block_sizes(size, value_size)
            row.derived[key] = (
                bits,
                _mask(*by_queries, key_lists(row, rule, *first), first, (batch, heads)),
                _mask(*backward, query_lists(row, rule, *second), second, (batch, heads)),
            )
        return row.derived[key]


def works(layer: Layer, device: torch.device) -> bool:
    """Whether its kernels give what they should, tried on a few numbers once for layers of a kind."""
    return _takes_bits(kind_of(layer), device) is not None


@cache
def _takes_bits(kind: Layer, device: torch.device) -> bool | None:
    """Whether kernels for layers of a kind take masks as bits; None if they go wrong with the library's own as well.

    Those as bits take the place of a part inside the library, which a release may change.
    """
    if masks_are_own() and trial.passed(
        partial(_OnRow, bits=True),
        kind,
        device,
        "preftree's masks do not fit the installed flash-attn-4, whose own serve, somewhat slower",
    ):
        return True
    own = trial.passed(
        partial(_OnRow, bits=False),
        kind,
        device,
        f"the installed flash-attn-4 does not compute attention with masks at head size {kind.size}, another backend serves",
    )
    return False if own else None


def _mask(
    function: Any, arrays: torch.Tensor, lists: BlockLists, sizes: tuple[int, int], heads: tuple[int, int]
) -> dict[str, Any]:
    """The rule as arguments of the kernels, which read each of the arrays by address; the row keeps them."""
    from cutlass import Int64
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    # For batch and heads: in each layer the library would expand them to these.
    expanded = BlockLists(*(each.expand(*heads, *each.shape[2:]) for each in lists))
    return {
        "mask_mod": function,
        "aux_scalars": tuple(Int64(array.data_ptr()) for array in arrays),
        "block_sparse_tensors": BlockSparseTensorsTorch(*expanded, block_size=sizes),
    }
