"""A row's attention as one operator: what compiled layers call, opaque to the compiler.

A layer is compiled once for all rows, so its code may not hold a row. It gets a number instead, as the length of an empty
tensor: the mask of that number is looked up when the operator runs, in the forward and in the backward pass. What one keeps
for the other goes through the compiled code as its own tensors do, so that activation checkpointing drops and makes it again
like all else.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch.utils.flop_counter import register_flop_formula

from preftree.attention import Scores
from preftree.attention.passes import Gradients
from preftree.models.custom_ops import composite, fake, opaque


class Mask(Protocol):
    """What attends for a row: see `interface.RowMask`."""

    def forward(
        self, layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exps."""
        ...

    def backward(self, grad, query, key, value, out, lse, scores: Scores) -> Gradients:
        """Gradients of queries, keys, values, sinks and bias."""
        ...


_masks: WeakValueDictionary[int, Mask] = WeakValueDictionary()
# Lengths that are equal in one call are taken for the same symbol: no other tensor is as long as these.
_numbers = count(2**40)


def register(mask: Mask, device: torch.device) -> torch.Tensor:
    """``[0, number]``, by which the operator finds a mask for as long as somebody holds it.

    A length and not a value, so that it lies on the layer's device and nobody waits for it. With a tensor on the CPU among its
    arguments, the compiler takes what an operator returns for unaligned, and reads it one number at a time.
    """
    number = next(_numbers)
    _masks[number] = mask
    return torch.empty(0, number, device=device)


def _find(handle: torch.Tensor) -> Mask:
    mask = _masks.get(handle.shape[1])
    if mask is None:
        raise RuntimeError(
            "the row of this backward pass is gone: it is kept by the hidden states of its forward pass, which nothing "
            "refers to any more. Compute the loss from them"
        )
    return mask


@opaque(
    "row_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor handle, float scale, "
    "float? softcap, str layer) -> (Tensor, Tensor)"
)
def _forward(q_BHND, k_BGSD, v_BGSE, sinks, bias, handle, scale, softcap, layer):
    """Output ``[B, H, N, E]``, token by token in memory, and log-sum-exps ``[B, H, S]`` for the backward pass."""
    scores = Scores(scale, softcap, sinks, bias)
    out_BHNE, lse_BHS = _find(handle).forward(layer, q_BHND, k_BGSD, v_BGSE, scores)
    return _token_by_token(out_BHNE), lse_BHS


@fake(_forward)
def _(q_BHND, k_BGSD, v_BGSE, sinks, bias, handle, scale, softcap, layer):
    batch, heads, queries, _ = q_BHND.shape
    out_BNHE = q_BHND.new_empty((batch, queries, heads, v_BGSE.shape[-1]))
    return out_BNHE.transpose(1, 2), q_BHND.new_empty((batch, heads, k_BGSD.shape[2]), dtype=torch.float32)


@opaque(
    "row_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sinks, Tensor? bias, "
    "Tensor handle, float scale, float? softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _backward(grad_BHNE, q_BHND, k_BGSD, v_BGSE, out_BHNE, lse_BHS, sinks, bias, handle, scale, softcap):
    """Gradients of queries, keys, values, sinks and bias; empty of what there is none."""
    scores = Scores(scale, softcap, sinks, bias)
    found = _find(handle).backward(grad_BHNE, q_BHND, k_BGSD, v_BGSE, out_BHNE, lse_BHS, scores)
    given = (q_BHND, k_BGSD, v_BGSE, sinks, bias)
    dq, dk, dv, dsinks, dbias = (
        q_BHND.new_empty(0) if x is None else torch.zeros_like(x) if gradient is None else gradient
        for x, gradient in zip(given, found, strict=True)
    )
    return _token_by_token(dq), _token_by_token(dk), _token_by_token(dv), dsinks.contiguous(), dbias.contiguous()


@fake(_backward)
def _(grad_BHNE, q_BHND, k_BGSD, v_BGSE, out_BHNE, lse_BHS, sinks, bias, handle, scale, softcap):
    by_token = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q_BHND, k_BGSD, v_BGSE)]
    return *by_token, *(q_BHND.new_empty(0) if x is None else x.new_empty(x.shape) for x in (sinks, bias))


def _token_by_token(x_BHSD: torch.Tensor) -> torch.Tensor:
    """As ``[B, S, H, D]`` lies in memory, which is how kernels give it and projections want it."""
    x_BSHD = x_BHSD.transpose(1, 2)
    return x_BHSD if x_BSHD.is_contiguous() else x_BSHD.contiguous().transpose(1, 2)


class _RowAttention(torch.autograd.Function):
    """See `row_attention`."""

    @staticmethod
    def forward(ctx, q_BHND, k_BGSD, v_BGSE, sinks, bias, handle, scale, softcap, layer):
        out_BHNE, lse_BHS = _forward(q_BHND, k_BGSD, v_BGSE, sinks, bias, handle, scale, softcap, layer)
        ctx.save_for_backward(q_BHND, k_BGSD, v_BGSE, out_BHNE, lse_BHS, sinks, bias, handle)
        ctx.scale, ctx.softcap = scale, softcap
        return out_BHNE

    @staticmethod
    def backward(ctx, grad_BHNE):
        saved = ctx.saved_tensors  # once: under activation checkpointing the first look computes them again
        dq, dk, dv, dsinks, dbias = _backward(grad_BHNE, *saved, ctx.scale, ctx.softcap)
        *_, sinks, bias, _ = saved
        return dq, dk, dv, None if sinks is None else dsinks, None if bias is None else dbias, None, None, None, None


@composite(
    "row_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor handle, float scale, float? softcap, "
    "str layer) -> Tensor"
)
def row_attention(
    q_BHND: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSE: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    handle: torch.Tensor,
    scale: float,
    softcap: float | None,
    layer: str,
) -> torch.Tensor:
    """Attention output ``[B, H, N, E]``, token by token in memory.

    Args:
        handle: ``[0, number]``, see `register`.
        scale, softcap, sinks, bias: see `Scores`.
        layer: its name, for errors.
    """
    return _RowAttention.apply(q_BHND, k_BGSD, v_BGSE, sinks, bias, handle, scale, softcap, layer)


@register_flop_formula(torch.ops.preftree.row_attention_forward)
def _(q_shape, k_shape, v_shape, *_, **__):
    """As if each token saw all before it: what recomputing it would take (see `activation_memory_budget`)."""
    batch, heads, queries, size = q_shape
    return batch * heads * queries * k_shape[2] * (size + v_shape[-1])
