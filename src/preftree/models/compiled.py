"""Decoder layers under `torch.compile`: one compilation for all layers of a kind, none for another row length."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from preftree.models.interface import RowMask

_WRAPPER = "forward_with_checkpointing"
_OPTIONS: dict[str, Any] = {"dynamic": True}
# Compilations of one class's code: with and without gradients, by kind of attention, by what is trained. Dynamo's own limit
# of 8 would end in layers that run uncompiled.
_LIMITS: dict[str, Any] = {"recompile_limit": 64, "accumulated_recompile_limit": 1024}


def compile_layers(model: torch.nn.Module) -> int:
    """Let the decoder layers of a transformers model run rows compiled; returns how many it found.

    Layers of one class run the same code, so that the first one's compilation serves all; lengths are symbolic, so that it
    serves rows of every length. Attention itself stays outside: it has kernels of its own. So does what cannot be compiled
    (routing by value in a mixture of experts), between compiled parts. Activation checkpointing goes around the compiled
    code. Ordinary batches and generation run as before. Nothing is compiled until a layer runs.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        if not getattr(layer, "runs_rows_compiled", False):
            kind: Any = type(layer)
            layer.__class__ = _compiled_class(kind)
    return len(layers)


def stock_forward(cls: Any) -> Any:
    """The forward pass of a class of layers, without the checkpointing or compilation around it."""
    forward = getattr(cls, "forward_before_compilation", cls.forward)
    # Where checkpointing is wrapped around `forward`, each subclass gets a wrapper of its own (`__init_subclass__`).
    while getattr(getattr(forward, "__code__", None), "co_name", None) == _WRAPPER:
        forward = forward.__wrapped__
    return forward


@cache
def _compiled_class(cls: Any) -> Any:
    """A layer class whose instances run rows compiled, by the same name: sharding policies ask for it.

    A class and not the instance's own attribute, which deep copies would take along bound to the original's weights.
    """
    stock = stock_forward(cls)
    compiled = torch._dynamo.config.patch(_LIMITS)(torch.compile(stock, **_OPTIONS))

    def forward(self, *args, **kwargs):
        by_row = any(isinstance(given, RowMask) for given in (*args, *kwargs.values()))
        return (compiled if by_row else stock)(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = {"forward": forward, "forward_before_compilation": stock, "runs_rows_compiled": True}
    return type(cls.__name__, (cls,), names | own)
