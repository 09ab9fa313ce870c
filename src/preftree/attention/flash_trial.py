"""A few numbers through a kernel's two passes: how far from plain attention they come out."""

from __future__ import annotations

from typing import Any

import torch

from preftree.attention.mask import visible_nodes
from preftree.attention.scores import Scores, repeat_heads
from preftree.kernels import relative_errors
from preftree.packing import PackedRow, pack
from preftree.tree import TokenTree


def trial_row(device: torch.device) -> PackedRow:
    """A pair, a sequence and padding, in more than three blocks of 128 tokens."""
    prompt = [0] * 150
    pair = TokenTree.from_sequences([prompt + [1] * 100, prompt + [2] * 60], [150, 150])
    return pack([pair, TokenTree.from_sequences([[3] * 50], [1])], 400)[0].to(device)


def errors(
    attention: Any, row: PackedRow, dtype: torch.dtype, heads: tuple[int, int], sizes: tuple[int, int]
) -> list[float]:
    """Relative norms of the errors of output and gradients of queries, keys and values.

    Args:
        attention: with the two passes of `attention.passes`, bound to ``row`` and causal.
        heads: query and key-value heads.
        sizes: of queries and keys, and of values.
    """
    generator = torch.Generator(row.device).manual_seed(0)
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]), (heads[0], sizes[1]))
    q, k, v, grad = (
        torch.randn(1, len(row), *shape, device=row.device, generator=generator).to(dtype).transpose(1, 2)
        for shape in shapes
    )
    scores = Scores(sizes[0] ** -0.5)
    with torch.autocast(row.device.type, enabled=False):
        out, lse = attention.forward(q, k, v, scores)
        found = (out, *attention.backward(grad, q, k, v, out, lse, scores)[:3])
        expected = _written_out(q, k, v, grad, visible_nodes(row), scores.scale)
    return relative_errors(found, expected)


def _written_out(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSE: torch.Tensor,
    grad_BHSE: torch.Tensor,
    visible_SS: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Output and gradients in float32, without autograd: operators run where it is out of reach."""
    groups = k_BGSD.shape[1]
    q, grad = q_BHSD.float(), grad_BHSE.float()
    k, v = (repeat_heads(x.float(), q.shape[1]) for x in (k_BGSD, v_BGSE))
    p = (q @ k.mT * scale).masked_fill(~visible_SS, float("-inf")).softmax(-1)
    out = p @ v
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    return out, ds @ k, dk, dv
