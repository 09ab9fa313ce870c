"""Tree attention through FlexAttention's Triton kernels, compiled for static shapes."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from preftree.attention.blocks import key_lists, query_lists
from preftree.attention.layer import Layer
from preftree.attention.mask import Rule
from preftree.attention.scores import Scores, repeat_heads
from preftree.kernels import has_triton
from preftree.packing import PackedRow

BLOCK = 128
# Kernels that may be compiled: one for each row length, kind of mask and kind of scores that occurs. Dynamo's own limit
# of 8 would end in an uncompiled attention that writes all scores out.
_MOST_KERNELS = 512
# Head size that PyTorch compiles its kernels for.
_SMALLEST = 16


def refusal(layer: Layer) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if layer.device != "cuda":
        return f"FlexAttention has no backward pass on {layer.device!r}"
    if min(layer.size, layer.value_size) < _SMALLEST:
        return f"its kernels take head sizes from {_SMALLEST}, not {layer.size} and {layer.value_size}"
    if not has_triton():
        return "FlexAttention compiles to Triton, which is not installed"
    if layer.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels compute in bfloat16, float16 or float32, not {str(layer.dtype).removeprefix('torch.')}"
    return None


@cache
def _compiled():
    # Static shapes: rows come in a few fixed lengths, and dynamic ones cost FlexAttention 25 to 40 per cent.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    limits = {"recompile_limit": _MOST_KERNELS, "accumulated_recompile_limit": _MOST_KERNELS}
    return torch._dynamo.config.patch(**limits)(compiled)


def block_mask(row: PackedRow, rule: Rule, block: int = BLOCK) -> BlockMask:
    """The row's mask in blocks; entries are evaluated only in partial blocks."""
    key = ("flex", rule.key, block)
    if key in row.derived:
        return row.derived[key]
    end, position_ids = row.end, row.position_ids

    if rule.causal:

        def mask_mod(batch, head, query, key):
            return (key <= query) & (query < end[key])
    elif rule.known:
        lowest = rule.lowest(position_ids)

        def mask_mod(batch, head, query, key):
            return (key <= query) & (query < end[key]) & (position_ids[key] >= lowest[query])
    elif (nodes := rule.nodes) is not None:

        def mask_mod(batch, head, query, key):
            below = (key <= query) & (query < end[key])
            above = (query <= key) & (key < end[query])
            return (below | above) & nodes(batch, head, query, key)
    else:

        def mask_mod(batch, head, query, key):
            inside = rule.function(batch, head, position_ids[query], position_ids[key])
            return (key <= query) & (query < end[key]) & inside

    mask = BlockMask(
        (len(row), len(row)),
        *key_lists(row, rule, block, block),
        *query_lists(row, rule, block, block),
        BLOCK_SIZE=(block, block),
        mask_mod=mask_mod,
    )
    if rule.known:
        row.derived[key] = mask
    return mask


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
            kernel_options=_options(q_BHSD, v_BGSE),
            return_aux=AuxRequest(lse=True),
        )
        if scores.sinks is not None:
            # A sink only adds exp(sink) to the softmax's denominator: scale by exp(lse) / (exp(lse) + exp(sink)).
            share_BHS = torch.sigmoid(aux.lse - scores.sinks.float().view(1, -1, 1))
            out_BHSE = (out_BHSE * share_BHS[..., None]).to(out_BHSE.dtype)
        return out_BHSE

    return attend


def _options(q_BHSD: torch.Tensor, v_BGSE: torch.Tensor) -> dict[str, object]:
    # Left to choose, it takes its decoding kernel for rows below 128 tokens, which has none for some shapes.
    options: dict[str, object] = {"BACKEND": "TRITON"}
    usual = q_BHSD.dtype in (torch.bfloat16, torch.float16) and q_BHSD.shape[-1] == v_BGSE.shape[-1] == 128
    if usual and q_BHSD.is_cuda and torch.cuda.get_device_capability(q_BHSD.device)[0] == 9:
        # The fastest of those that autotuning tries on an H100; FlexAttention's own choice takes 4 per cent longer.
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
    return options
