"""Variable-length kernels that `varlen` can use: FlashAttention-4, or torch's own `varlen_attn` (FlashAttention-2).

They take a row's queries, keys and values ``[S, H, D]``, ``[S, G, D]`` and ``[S, G, E]`` and give ``[S, H, E]``: torch's as
one differentiable call, FlashAttention-4's as its two passes. Kernels see keys and values copied to the paths of the
`PathPlan`, ``K`` of them, and are causal from the bottom right, queries being the last keys of their block. At the row's
padding, which no block holds, outputs are zeros.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from preftree.attention import fa4
from preftree.attention.copying import copy_to_paths, sum_pieces, sum_tiles
from preftree.attention.layer import Layer
from preftree.attention.paths import PathPlan
from preftree.attention.scores import Scores


def fa4_refusal(layer: Layer) -> str | None:
    """Why FlashAttention-4 cannot serve a layer path by path, or None."""
    if layer.rule.chunk is not None or not layer.rule.known:
        return "its kernels know causal attention and sliding windows, the family's mask is another"
    return fa4.refusal(layer, capabilities=(9, 10))


def torch_refusal(layer: Layer) -> str | None:
    """Why torch's `varlen_attn` cannot serve a layer path by path, or None."""
    if layer.device != "cuda":
        return f"torch's variable-length attention needs a CUDA device, not {layer.device!r}"
    if layer.rule.chunk is not None or not layer.rule.known:
        return "torch's variable-length attention knows causal attention and sliding windows only"
    if layer.softcap or layer.sinks or layer.bias:
        return "torch's variable-length attention has no soft caps, sinks or biases"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"torch's variable-length attention computes in bfloat16 or float16, not {layer.dtype}"
    if layer.size != layer.value_size or layer.size % 8 or layer.size > 256:
        return "torch's variable-length attention wants one head size of up to 256 in steps of 8"
    if layer.capability is not None and layer.capability[0] < 8:
        return "torch's variable-length attention needs compute capability 8.0 or later"
    return None


def choose(layer: Layer) -> str | None:
    """The fastest kernel that can serve a layer: "fa4" or "torch"; or None."""
    if fa4_refusal(layer) is None:
        return "fa4"
    return "torch" if torch_refusal(layer) is None else None


def by_torch(q_SHD, k_SGD, v_SGE, plan: PathPlan, window: int | None, scores: Scores) -> torch.Tensor:
    """torch's `varlen_attn`."""
    from torch.nn.attention.varlen import varlen_attn

    heads = q_SHD.shape[1]
    if plan.in_place:
        k_KGD, v_KGE = k_SGD[: plan.num_keys], v_SGE[: plan.num_keys]
    else:
        k_KGD, v_KGE = copy_to_paths(k_SGD, v_SGE, plan)
    grouped: dict[str, Any] = {}
    if k_KGD.shape[1] != heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    elif k_KGD.shape[1] != heads:  # up to torch 2.11
        k_KGD, v_KGE = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_KGD, v_KGE))
    out_THE: Any = varlen_attn(
        q_SHD[: plan.num_tokens],
        k_KGD,
        v_KGE,
        plan.query_starts,
        plan.key_starts,
        plan.longest_queries,
        plan.longest_keys,
        scale=scores.scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return torch.nn.functional.pad(out_THE, (0, 0, 0, 0, 0, len(q_SHD) - plan.num_tokens))


def fa4_forward(
    q_SHD, k_SGD, v_SGE, plan: PathPlan, window: int | None, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-4's output, and log-sum-exps ``[H, T]`` of the row's ``T`` tokens, with the sinks' part."""
    tokens, keys = plan.num_tokens, plan.num_keys
    k_KGD, v_KGE = _keys(k_SGD, v_SGE, plan)
    out_SHE = q_SHD.new_empty((*q_SHD.shape[:2], v_KGE.shape[-1]))
    out_SHE[tokens:] = 0
    _, lse_HT, *_ = fa4.kernels()._flash_attn_fwd(
        q_SHD[:tokens],
        k_KGD[:keys],
        v_KGE[:keys],
        out=out_SHE[:tokens],
        learnable_sink=scores.sinks,
        pack_gqa=False,
        return_lse=True,
        **fa4.capping(scores.softcap),
        **_arguments(plan, window, scores),
    )
    return out_SHE, lse_HT


def fa4_backward(
    grad_SHE, q_SHD, k_SGD, v_SGE, out_SHE, lse_HT, plan: PathPlan, window: int | None, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of queries, keys, values and sinks (None without sinks), from what `fa4_forward` gave.

    The gradient of a key is the sum over its copies. Where the kernel has float32 sums, they are what is added.
    """
    tokens, keys = plan.num_tokens, plan.num_keys
    # Keys are copied to their paths once more: kept, they would take more memory than the row's own.
    k_KGD, v_KGE = _keys(k_SGD, v_SGE, plan)
    options = {
        "learnable_sink": scores.sinks,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **fa4.capping(scores.softcap, backward=True),
        **_arguments(plan, window, scores),
    }
    dq_SHD, dk_KGD, dv_KGE = (x.new_empty(x.shape) for x in (q_SHD, k_KGD, v_KGE))
    dq_SHD[tokens:] = 0
    inputs = (q_SHD[:tokens], k_KGD[:keys], v_KGE[:keys], out_SHE[:tokens], grad_SHE[:tokens], lse_HT)
    if keys == tokens:
        dk_KGD[keys:], dv_KGE[keys:] = 0, 0
        _, _, _, *dsinks = fa4.kernels()._flash_attn_bwd(
            *inputs, dq=dq_SHD[:tokens], dk=dk_KGD[:keys], dv=dv_KGE[:keys], **options
        )
        dk_SGD, dv_SGE = dk_KGD, dv_KGE
    else:
        (_, _, _, *dsinks), sums = fa4.backward(*inputs, dq=dq_SHD[:tokens], dk=dk_KGD, dv=dv_KGE, **options)
        starts, pieces = plan.key_starts, (plan.sources, plan.origins, tokens, len(q_SHD))
        dk_SGD, dv_SGE = (
            sum_tiles(sums[name], x, starts, *pieces) if name in sums else sum_pieces(x, *pieces)
            for name, x in (("dk", dk_KGD), ("dv", dv_KGE))
        )
    return dq_SHD, dk_SGD, dv_SGE, None if scores.sinks is None else dsinks[0]


def _keys(k_SGD: torch.Tensor, v_SGE: torch.Tensor, plan: PathPlan) -> tuple[torch.Tensor, torch.Tensor]:
    return (k_SGD, v_SGE) if plan.in_place else copy_to_paths(k_SGD, v_SGE, plan)


def _arguments(plan: PathPlan, window: int | None, scores: Scores) -> dict[str, Any]:
    return {
        "cu_seqlens_q": plan.query_starts,
        "cu_seqlens_k": plan.key_starts,
        "max_seqlen_q": plan.longest_queries,
        "max_seqlen_k": plan.longest_keys,
        "causal": window is None,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        "softmax_scale": scores.scale,
    }
