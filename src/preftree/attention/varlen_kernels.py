"""Variable-length kernels that `varlen` can use: FlashAttention-4, or torch's own `varlen_attn` (FlashAttention-2).

Each is a function ``(q [S, H, D], k [S, G, D], v [S, G, E], plan, window, scores) -> out [S, H, E]``, differentiable. Its
kernel sees keys and values copied to the paths of the `PathPlan`, ``K`` of them, and is causal from the bottom right,
queries being the last keys of their block. At the row's padding, which no block holds, outputs are zeros.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from preftree.attention import fa4
from preftree.attention.copying import copy_to_paths, sum_pieces, sum_tiles
from preftree.attention.layer import Layer
from preftree.attention.paths import PathPlan
from preftree.attention.scores import Scores

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PathPlan, int | None, Scores], torch.Tensor]


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


def choose(layer: Layer) -> Kernel | None:
    """The fastest kernel that can serve a layer, or None."""
    if fa4_refusal(layer) is None:
        return by_fa4
    if torch_refusal(layer) is None:
        return by_torch
    return None


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


def by_fa4(q_SHD, k_SGD, v_SGE, plan: PathPlan, window: int | None, scores: Scores) -> torch.Tensor:
    """FlashAttention-4."""
    out_SHE, _ = _fa4_forward(q_SHD, k_SGD, v_SGE, *_keys(k_SGD, v_SGE, plan), *_options(plan, window, scores))
    return out_SHE


def fa4_forward(
    q_SHD, k_SGD, v_SGE, plan: PathPlan, window: int | None, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `by_fa4`, not differentiable: the output and log-sum-exps ``[H, T]`` of the row's ``T`` tokens."""
    return _run_fa4_forward(q_SHD, k_SGD, v_SGE, *_keys(k_SGD, v_SGE, plan), *_options(plan, window, scores))


def fa4_backward(
    grad_SHE, q_SHD, k_SGD, v_SGE, out_SHE, lse_HT, plan: PathPlan, window: int | None, scores: Scores
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys, values and sinks (empty without sinks), from what `fa4_forward` gave."""
    # Keys are copied to their paths once more: kept, they would take more memory than the row's own.
    copied = _keys(k_SGD, v_SGE, plan)
    return _run_fa4_backward(grad_SHE, q_SHD, *copied, out_SHE, lse_HT, *_options(plan, window, scores))


def _keys(k_SGD: torch.Tensor, v_SGE: torch.Tensor, plan: PathPlan) -> tuple[torch.Tensor, torch.Tensor]:
    if plan.in_place:
        return k_SGD, v_SGE
    with torch.no_grad():  # gradients go past the copies, see `_run_fa4_backward`
        return copy_to_paths(k_SGD, v_SGE, plan)


def _options(plan: PathPlan, window: int | None, scores: Scores) -> tuple:
    return (
        scores.sinks,
        [plan.query_starts, plan.key_starts, plan.sources, plan.origins],
        [plan.num_tokens, plan.num_keys, plan.longest_queries, plan.longest_keys],
        window,
        scores.scale,
        scores.softcap or 0.0,
    )


def _arguments(tables, lengths, window, scale) -> dict:
    return {
        "cu_seqlens_q": tables[0],
        "cu_seqlens_k": tables[1],
        "max_seqlen_q": lengths[2],
        "max_seqlen_k": lengths[3],
        "causal": window is None,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        "softmax_scale": scale,
    }


def _run_fa4_forward(
    q_SHD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGE: torch.Tensor,
    k_KGD: torch.Tensor,
    v_KGE: torch.Tensor,
    sinks: torch.Tensor | None,
    tables: list[torch.Tensor],
    lengths: list[int],
    window: int | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and log-sum-exps ``[H, T]`` of the tokens that are not padding, with the sinks' part.

    The row's keys and values are here for their gradients, their copies are what is computed with.
    """
    tokens, keys = lengths[:2]
    out_SHE = q_SHD.new_empty((*q_SHD.shape[:2], v_KGE.shape[-1]))
    out_SHE[tokens:] = 0
    _, lse_HT, *_ = fa4.kernels()._flash_attn_fwd(
        q_SHD[:tokens],
        k_KGD[:keys],
        v_KGE[:keys],
        out=out_SHE[:tokens],
        learnable_sink=sinks,
        pack_gqa=False,
        return_lse=True,
        **fa4.capping(softcap),
        **_arguments(tables, lengths, window, scale),
    )
    return out_SHE, lse_HT


_fa4_forward = torch.library.custom_op("preftree::fa4_varlen_forward", _run_fa4_forward, mutates_args=())


@_fa4_forward.register_fake
def _(q_SHD, k_SGD, v_SGE, k_KGD, v_KGE, sinks, tables, lengths, window, scale, softcap):
    out_SHE = q_SHD.new_empty((*q_SHD.shape[:2], v_KGE.shape[-1]))
    return out_SHE, q_SHD.new_empty((q_SHD.shape[1], lengths[0]), dtype=torch.float32)


def _run_fa4_backward(
    grad_SHE: torch.Tensor,
    q_SHD: torch.Tensor,
    k_KGD: torch.Tensor,
    v_KGE: torch.Tensor,
    out_SHE: torch.Tensor,
    lse_HT: torch.Tensor,
    sinks: torch.Tensor | None,
    tables: list[torch.Tensor],
    lengths: list[int],
    window: int | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the row's queries, keys and values, and of sinks (empty without sinks).

    The gradient of a key is the sum over its copies. Where the kernel has float32 sums, they are what is added.
    """
    tokens, keys = lengths[:2]
    options = {
        "learnable_sink": sinks,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **fa4.capping(softcap, backward=True),
        **_arguments(tables, lengths, window, scale),
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
        _, key_starts, sources, origins = tables
        dk_SGD, dv_SGE = (
            sum_tiles(sums[name], x, key_starts, sources, origins, tokens, len(q_SHD))
            if name in sums
            else sum_pieces(x, sources, origins, tokens, len(q_SHD))
            for name, x in (("dk", dk_KGD), ("dv", dv_KGE))
        )
    return dq_SHD, dk_SGD, dv_SGE, dsinks[0] if sinks is not None else q_SHD.new_empty(0)


_fa4_backward = torch.library.custom_op("preftree::fa4_varlen_backward", _run_fa4_backward, mutates_args=())


@_fa4_backward.register_fake
def _(grad_SHE, q_SHD, k_KGD, v_KGE, out_SHE, lse_HT, sinks, *options):
    length = q_SHD.shape[0]
    gradients = (q_SHD.new_empty(q_SHD.shape), *(x.new_empty((length, *x.shape[1:])) for x in (k_KGD, v_KGE)))
    return *gradients, q_SHD.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _save(ctx, inputs, output):
    q_SHD, _, _, k_KGD, v_KGE, sinks, tables, *options = inputs
    ctx.save_for_backward(q_SHD, k_KGD, v_KGE, *output, *tables, *([] if sinks is None else [sinks]))
    ctx.options = options


def _differentiate(ctx, grad_SHE, _):
    # The log-sum-exps are for the backward pass alone: nobody gets them, so they have no gradient.
    q, k, v, out, lse, *tables = ctx.saved_tensors
    sinks = tables.pop() if len(tables) > 4 else None
    dq, dk, dv, dsinks = _fa4_backward(grad_SHE, q, k, v, out, lse, sinks, tables, *ctx.options)
    return dq, dk, dv, None, None, None if sinks is None else dsinks, [None] * 4, *[None] * 4


_fa4_forward.register_autograd(_differentiate, setup_context=_save)
