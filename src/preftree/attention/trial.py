"""A few numbers through a kernel's two passes: how far from plain attention they come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from preftree.attention.layer import Layer
from preftree.attention.mask import CAUSAL, Rule, sliding_window, visible_nodes
from preftree.attention.scores import Scores, repeat_heads
from preftree.kernels import relative_errors, works
from preftree.packing import PackedRow, pack
from preftree.tree import TokenTree

_WINDOW = sliding_window(100)


def trial_row(device: torch.device) -> PackedRow:
    """A pair, a sequence and padding, in more than three blocks of 128 tokens."""
    prompt = [0] * 150
    pair = TokenTree.from_sequences([prompt + [1] * 100, prompt + [2] * 60], [150, 150])
    return pack([pair, TokenTree.from_sequences([[3] * 50], [1])], 400)[0].to(device)


def kind_of(layer: Layer) -> Layer:
    """What tells layers apart whose kernels are tried one by one."""
    return replace(layer, rule=CAUSAL if layer.rule.causal else _WINDOW, softcap=False, sinks=False, bias=False)


def passed(bind: Callable[[PackedRow, Rule], Any], kind: Layer, device: torch.device, warning: str) -> bool:
    """Whether what ``bind`` gives for the row of the trial computes right to half precision; otherwise it is warned of."""
    row = trial_row(device)
    heads, sizes = (kind.heads, kind.groups), (kind.size, kind.value_size)
    return works(lambda: errors(bind(row, kind.rule), row, kind.dtype, heads, sizes, kind.rule), warning)


def errors(
    attention: Any,
    row: PackedRow,
    dtype: torch.dtype,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    rule: Rule = CAUSAL,
) -> list[float]:
    """Relative norms of the errors of output and gradients of queries, keys and values, at all but the row's padding.

    Args:
        attention: with the two passes of `attention.passes`, bound to ``row`` and ``rule``.
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
        expected = _written_out(q, k, v, grad, visible_nodes(row, rule), scores.scale)
    return relative_errors(*([x[:, :, : row.num_tokens] for x in results] for results in (found, expected)))


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
