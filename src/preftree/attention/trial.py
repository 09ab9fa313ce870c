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
    return works(lambda: errors(bind(row, kind.rule), row, kind), warning)


def errors(attention: Any, row: PackedRow, kind: Layer) -> list[float]:
    """Relative norms of the errors of output and gradients of queries, keys and values, at all but the row's padding.

    Args:
        attention: with the two passes of `attention.passes`, bound to ``row`` and ``kind``'s rule.
        kind: the layers' shapes, type and rule.
    """
    generator = torch.Generator(row.device).manual_seed(0)
    shapes = (
        (kind.heads, kind.size),
        (kind.groups, kind.size),
        (kind.groups, kind.value_size),
        (kind.heads, kind.value_size),
    )
    q, k, v, grad = (
        torch.randn(1, len(row), *shape, device=row.device, generator=generator).to(kind.dtype).transpose(1, 2)
        for shape in shapes
    )
    scores = Scores(kind.size**-0.5)
    with torch.autocast(row.device.type, enabled=False):
        out, lse = attention.forward(q, k, v, scores)
        found = (out, *attention.backward(grad, q, k, v, out, lse, scores)[:3])
        expected = _written_out(q, k, v, grad, visible_nodes(row, kind.rule), scores.scale)
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
