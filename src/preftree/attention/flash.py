"""Tree attention through FlashAttention-4's block-sparse kernels, which the tree's rule is compiled into.

FlexAttention's `BACKEND="FLASH"` calls the same kernels. Called directly they serve every row length with one compiled
kernel, take the rule in a cheaper form (`flash_mask`), and leave out what FlexAttention does on the host for each call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from preftree.attention import fa4
from preftree.attention.blocks import BlockLists, key_lists, nodes_of, query_lists
from preftree.attention.layer import Layer
from preftree.attention.mask import Rule
from preftree.attention.passes import Gradients, differentiable
from preftree.attention.scores import Scores
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


def _tables(
    row: PackedRow, rule: Rule, sizes: tuple[tuple[int, int], tuple[int, int]], heads: torch.Size
) -> list[torch.Tensor]:
    """What the kernels need to know of the row, for batch and heads: in each layer the library would expand it to them.

    `blocks.nodes_of`; the `BlockLists` of query blocks, for the forward pass, and of key blocks, for the backward pass.
    """
    key = ("flash", rule.key, sizes, heads)
    if key not in row.derived:
        forward, backward = sizes
        lists = *key_lists(row, rule, *forward), *query_lists(row, rule, *backward)
        row.derived[key] = [nodes_of(row, rule), *(each.expand(*heads, *each.shape[2:]) for each in lists)]
    return row.derived[key]


def bind(row: PackedRow, rule: Rule):
    """Attention by FlashAttention-4 on this row; made for long rows, at its best from some thousand tokens on."""
    return _OnRow(row, rule)


class _OnRow:
    """Attention bound to a row."""

    def __init__(self, row: PackedRow, rule: Rule):
        self.row, self.rule = row, rule

    def __call__(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> torch.Tensor:
        return differentiable(self, q_BHSD, k_BGSD, v_BGSE, scores)

    def forward(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        mask, _ = self._masks(q_BHSD, v_BGSE)
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
        return out_BSHE.transpose(1, 2), lse_BHS

    def backward(self, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores: Scores) -> Gradients:
        _, mask = self._masks(q_BHSD, v_BGSE)
        with _order():
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
        return dq_BSHD.transpose(1, 2), dk_BSGD.transpose(1, 2), dv_BSGE.transpose(1, 2), dsinks_H, None

    def _masks(self, q_BHSD: torch.Tensor, v_BGSE: torch.Tensor) -> list[dict]:
        """`_mask` of the forward and of the backward pass, made once for layers of these shapes."""
        shape = (q_BHSD.shape[:2], q_BHSD.shape[-1], v_BGSE.shape[-1])
        key = ("flash masks", self.rule.key, shape)
        if key not in self.row.derived:
            sizes = block_sizes(*shape[1:])
            nodes, *lists = _tables(self.row, self.rule, sizes, shape[0])
            self.row.derived[key] = [
                _mask(nodes, part, list(size), not self.rule.causal)
                for part, size in zip((lists[:4], lists[4:]), sizes, strict=True)
            ]
        return self.row.derived[key]


def _mask(nodes: torch.Tensor, lists: list[torch.Tensor], sizes: list[int], from_lowest: bool) -> dict:
    """The rule as arguments of the kernels; they read the rows of ``nodes`` by address."""
    from cutlass import Int64
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from preftree.attention.flash_mask import tree_mask, tree_mask_from

    first, step = nodes.data_ptr(), nodes.stride(0) * nodes.element_size()
    return {
        "mask_mod": tree_mask_from if from_lowest else tree_mask,
        # Ends, and for a window positions and the lowest visible one.
        "aux_scalars": tuple(Int64(first + step * place) for place in range(3 if from_lowest else 1)),
        "block_sparse_tensors": BlockSparseTensorsTorch(*BlockLists(*lists), block_size=(sizes[0], sizes[1])),
    }


def _order() -> AbstractContextManager[None]:
    """`flash_order`, or the library's own order in a release whose scheduler is not the one that it knows."""
    try:
        from preftree.attention.flash_order import heads_together
    except ImportError:
        return nullcontext()
    return heads_together()
