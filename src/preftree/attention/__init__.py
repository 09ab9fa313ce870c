"""The visibility rule as attention: one function chooses the backend.

Shapes: ``B`` batch (always 1: a row), ``H`` query heads, ``G`` key-value heads, ``S`` row length, ``D`` head size of
queries and keys, ``E`` head size of values.

Every backend is a function ``bind(row, rule) -> attend``: it is called once per forward pass and kind of mask, and
returns ``attend(q_BHSD, k_BGSD, v_BGSE, scores) -> out_BHSE`` for the layers to call. What a layer adds to plain
attention is in :class:`~preftree.attention.scores.Scores`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from preftree.attention import dense, flex, varlen
from preftree.attention.mask import Rule
from preftree.attention.scores import Scores
from preftree.packing import PackedRow

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]

BACKENDS: dict[str, Callable[[PackedRow, Rule], Attend]] = {
    "dense": dense.bind,
    "flex": flex.bind,
    "varlen": varlen.bind,
}


def choose_backend(name: str, device: torch.device) -> str:
    """The backend for a device: ``name`` itself, or for "auto" FlexAttention on a GPU and runs through SDPA elsewhere.

    Raises:
        ValueError: for a name that is no backend.
        NotImplementedError: for a backend forced on a device that it cannot train on.
    """
    if name == "auto":
        return "flex" if device.type == "cuda" else "varlen"
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose from 'auto', {', '.join(map(repr, BACKENDS))}")
    if name == "flex" and device.type != "cuda":
        raise NotImplementedError(
            f"backend 'flex' cannot be used on {device.type!r}: FlexAttention has no backward pass there. "
            "Use 'auto', 'varlen' or 'dense'"
        )
    return name


__all__ = ["BACKENDS", "Attend", "Rule", "Scores", "choose_backend"]
