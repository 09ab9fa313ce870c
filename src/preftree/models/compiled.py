"""Decoder layers under `torch.compile`: one compilation for all layers of a kind, none for another row length."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from preftree.kernels import has_triton
from preftree.models.fusions import fuse
from preftree.models.interface import KeysReached, RowMask, active_row
from preftree.models.products import side_by_side

_WRAPPER = "forward_with_checkpointing"
# Dynamo's backend that compiles the rewritten graphs.
_BACKEND = "inductor"
_INDUCTOR: dict[str, Any] = {
    # Half precision is rounded where the stock layer rounds it, whatever is fused with what.
    "emulate_precision_casts": True,
    # Sums in one order, whichever kernel is fastest on the day: policy and reference with the same weights start with the
    # same bits, compiled with gradients and without, and runs repeat.
    "deterministic": True,
    # These are chosen by a row's length: it would be compiled once more for rows on the other side of some size.
    "triton.mix_order_reduction": False,
}
# Modules of operators that compiled code holds the formulas of.
_OPERATORS = ("operator", "heads", "rms_norm", "rms_norm_triton", "products", "products_formulas", "products_quack")
_DYNAMO: dict[str, Any] = {
    # Compilations of one class's code: with and without gradients, by kind of attention, by what is trained. Dynamo's own
    # limit of 8 would end in layers that run uncompiled.
    "recompile_limit": 64,
    "accumulated_recompile_limit": 1024,
    # A norm's epsilon is a constant and not a tensor that is made at every call.
    "specialize_float": True,
    # Layers that FSDP2 shares out are guarded as others are. Else their integers would be symbols, sizes of heads for one, and
    # kernels for heads of any size take up to 20 times as long.
    "skip_fsdp_guards": False,
    # Under DDP, Dynamo would cut graphs where gradients are exchanged, within layers: these are pieces enough.
    "optimize_ddp": False,
}


def compile_layers(model: torch.nn.Module, or_stock: bool = False, memory_budget: float = 1.0) -> int:
    """Let the decoder layers of a transformers model run rows compiled; returns how many it found.

    Layers of one class run the same code, so that the first one's compilation serves all; lengths are symbolic, so that it
    serves rows of every length. Attention is one operator in the compiled code (see `operator`). What cannot be compiled
    (routing by value in a mixture of experts, FlexAttention, which is compiled for a length) and what runs along paths (see
    `mixers`) runs between compiled parts.
    Activation checkpointing goes around the compiled code. Ordinary batches and generation run as before. Nothing is
    compiled until a layer runs.

    Args:
        or_stock: layers that do not compile run as they are, with a warning; otherwise that raises.
        memory_budget: share of what a layer would keep for its backward pass that it may keep; the rest is computed again
            there, what takes least operations first. 1 computes only what costs next to nothing; 0 the whole layer.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        if not getattr(layer, "runs_rows_compiled", False):
            kind: Any = type(layer)
            layer.__class__ = _compiled_class(kind, or_stock, memory_budget)
            side_by_side(layer)
    return len(layers)


def check_memory_budget(memory_budget: float) -> None:
    """Raise `ValueError` for what is no share."""
    if not 0 <= memory_budget <= 1:
        raise ValueError(f"activation_memory_budget must be between 0 and 1, got {memory_budget}")


def worth_compiling(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether layers are compiled where nobody has said: to run on a GPU with Triton, and weights are not quantised."""
    uncompiled = getattr(model, "is_quantized", False) or hinders_compiling(model) is not None
    return device.type == "cuda" and not uncompiled and has_triton()


def hinders_compiling(model: torch.nn.Module) -> str | None:
    """What puts a model's weights together while its layers run, so that these cannot be compiled, or None."""
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3, which gathers weights while layers run"
    if getattr(model, "tp_size", None) is not None:
        return "tensor parallelism, which wraps parts of layers"
    return None


def stock_forward(cls: Any) -> Any:
    """The forward pass of a class of layers, without the checkpointing or compilation around it."""
    forward = getattr(cls, "forward_before_compilation", cls.forward)
    # Where checkpointing is wrapped around `forward`, each subclass gets a wrapper of its own (`__init_subclass__`).
    while getattr(getattr(forward, "__code__", None), "co_name", None) == _WRAPPER:
        forward = forward.__wrapped__
    return forward


def keys_of(layer: torch.nn.Module) -> Any:
    """A function of a layer and its arguments, with a mask that `wants_keys`, that gives its keys and values; compiled too."""
    return getattr(type(layer), "keys_of_row", None) or _keys_of(stock_forward(type(layer)))


def _keys_of(forward: Any) -> Any:
    def keys(layer, *args, **kwargs):
        try:
            forward(layer, *args, **kwargs)
        except KeysReached as reached:
            return reached.args
        raise NotImplementedError(f"{type(layer).__name__} does not attend through transformers' attention interface")

    return keys


def _rewritten(module: GraphModule, inputs: list[Any], memory_budget: float) -> Any:
    """The backend that Dynamo gives the graphs that it captured: what they are rewritten to, compiled."""
    fuse(module)
    # Our operators count among what takes time to compute again.
    kept = {"activation_memory_budget": memory_budget, "is_non_builtin_to_include": True} if memory_budget < 1 else {}
    settings: Any = torch.compiler.config
    with torch._functorch.config.patch(_known(kept, torch._functorch.config)):
        if _BACKEND != "inductor":
            return lookup_backend(_BACKEND)(module, inputs)
        known = torch._inductor.list_options()
        patches = {name: on for name, on in _INDUCTOR.items() if name in known}
        with settings.patch(cache_key_tag=f"{settings.cache_key_tag} {_formulas()}"):
            return compile_fx(module, inputs, config_patches=patches)


def _known(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    """Those that this release of PyTorch has."""
    return {name: on for name, on in settings.items() if hasattr(config, name)}


@functools.cache
def _backend(memory_budget: float) -> Callable[..., Any]:
    """The one object for a budget: code that has been compiled is found by its backend."""
    return functools.partial(_rewritten, memory_budget=memory_budget)


@functools.cache
def _formulas() -> str:
    """What PyTorch's caches on disk are to tell versions of our operators apart by: they know them by name alone."""
    code = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in _OPERATORS)
    return f"preftree {hashlib.sha256(code).hexdigest()}"


def _compile(function: Callable[..., Any], name: str, or_stock: bool, memory_budget: float) -> Callable[..., Any]:
    code = torch.compile(function, dynamic=True, backend=_backend(memory_budget))
    runs = torch._dynamo.config.patch(_known(_DYNAMO, torch._dynamo.config))(code)
    if not or_stock:
        return runs

    @functools.wraps(function)
    def run(*args, **kwargs):
        nonlocal runs
        try:
            return runs(*args, **kwargs)
        except TorchDynamoException as error:
            warnings.warn(
                f"{name} does not compile and runs uncompiled, slower; compile=False does so from the start: {error}",
                UserWarning,
                stacklevel=2,
            )
            runs = function
            return runs(*args, **kwargs)

    return run


@functools.cache
def _compiled_class(cls: Any, or_stock: bool, memory_budget: float) -> Any:
    """A layer class whose instances run rows compiled, by the same name: sharding policies ask for it.

    A class and not the instance's own attribute, which deep copies would take along bound to the original's weights.
    """
    stock = stock_forward(cls)
    compiled = _compile(stock, cls.__name__, or_stock, memory_budget)

    def forward(self, *args, **kwargs):
        # (A layer that attends to nothing is given no mask; one that runs again for its backward pass finds the row in it.)
        by_row = active_row() is not None or any(isinstance(given, RowMask) for given in (*args, *kwargs.values()))
        return (compiled if by_row else stock)(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = {"forward": forward, "forward_before_compilation": stock, "runs_rows_compiled": True}
    own["keys_of_row"] = staticmethod(_compile(_keys_of(stock), cls.__name__, or_stock, memory_budget))
    return type(cls.__name__, (cls,), names | own)
