"""Tree attention through FlexAttention, compiled for static shapes."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from preftree.attention.mask import Rule, visible_blocks
from preftree.attention.scores import Scores, repeat_heads
from preftree.packing import PackedRow

BLOCK = 128
# Kernels that may be compiled: one for each row length, kind of mask and kind of scores that occurs. Dynamo's own limit
# of 8 would end in an uncompiled attention that writes all scores out.
_MOST_KERNELS = 512


@cache
def _compiled():
    # Static shapes: rows come in a few fixed lengths, and dynamic ones cost FlexAttention 25 to 40 per cent.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    limits = {"recompile_limit": _MOST_KERNELS, "accumulated_recompile_limit": _MOST_KERNELS}
    return torch._dynamo.config.patch(**limits)(compiled)


def block_mask(row: PackedRow, rule: Rule, block: int = BLOCK) -> BlockMask:
    """The row's mask in blocks, made from block minima and maxima; entries are evaluated only in partial blocks."""
    end, position_ids = row.end, row.position_ids

    if rule.causal:

        def mask_mod(batch, head, query, key):
            return (key <= query) & (query < end[key])
    else:

        def mask_mod(batch, head, query, key):
            inside = rule.function(batch, head, position_ids[query], position_ids[key])
            return (key <= query) & (query < end[key]) & inside

    some, everything = visible_blocks(row, rule, block)
    partial = some & ~everything
    return BlockMask.from_kv_blocks(
        *_block_lists(partial),
        *_block_lists(everything),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(len(row), len(row)),
    )


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[1, 1, Q]`` counts and ``[1, 1, Q, K]`` key blocks of each query block, those counted first, in order."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def bind(row: PackedRow, rule: Rule):
    """Attention by a compiled FlexAttention kernel (GPU; on a CPU it has no backward pass)."""
    mask = block_mask(row, rule)

    def attend(q_BHSD, k_BGSD, v_BGSE, scores: Scores):
        heads = q_BHSD.shape[1]
        softcap, bias = scores.softcap, scores.bias
        score_mod = None
        if softcap is not None or bias is not None:

            def score_mod(score, batch, head, query, key):
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                if bias is not None:
                    score = score + bias[0, head, query, key]
                return score

        grouped = k_BGSD.shape[1] != heads
        if grouped and (heads & (heads - 1)):
            # FlexAttention's grouped heads want a power of two of them.
            k_BGSD, v_BGSE, grouped = repeat_heads(k_BGSD, heads), repeat_heads(v_BGSE, heads), False
        function = flex_attention if torch.compiler.is_compiling() else _compiled()
        out_BHSE, aux = function(
            q_BHSD,
            k_BGSD,
            v_BGSE,
            score_mod=score_mod,
            block_mask=mask,
            scale=scores.scale,
            enable_gqa=grouped,
            # Left to choose, it takes its decoding kernel for rows below 128 tokens, which has none for some shapes.
            kernel_options={"BACKEND": "TRITON"},
            return_aux=AuxRequest(lse=True),
        )
        if scores.sinks is not None:
            # A sink only adds exp(sink) to the softmax's denominator: scale by exp(lse) / (exp(lse) + exp(sink)).
            share_BHS = torch.sigmoid(aux.lse - scores.sinks.float().view(1, -1, 1))
            out_BHSE = (out_BHSE * share_BHS[..., None]).to(out_BHSE.dtype)
        return out_BHSE

    return attend
