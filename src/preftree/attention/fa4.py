"""FlashAttention-4 (the package flash-attn-4), as far as `flash` and `varlen` share it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from preftree.attention.layer import Layer

# What the kernels are called with; older releases lack some of it.
_NEEDED = ("mask_mod", "aux_scalars", "block_sparse_tensors", "learnable_sink", "cu_seqlens_q")


@cache
def library() -> ModuleType | str:
    """The library's module of kernels, or why it cannot be used."""
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        return f"flash-attn-4 is not installed or does not load ({error}): pip install 'preftree[flash]'"
    for function in (interface._flash_attn_fwd, interface._flash_attn_bwd):
        missing = [name for name in _NEEDED if name not in inspect.signature(function).parameters]
        if missing:
            return f"this flash-attn-4 lacks {', '.join(missing)}: preftree needs 4.0.0b36 or later"
    return interface


def refusal(layer: Layer, capabilities: tuple[int, ...]) -> str | None:
    """Why the kernels cannot serve a layer on devices of these major compute capabilities, or None."""
    if layer.device != "cuda":
        return f"FlashAttention-4 needs a CUDA device, not {layer.device!r}"
    if layer.capability is not None and layer.capability[0] not in capabilities:
        names = " and ".join(f"{major}.x" for major in capabilities)
        return f"its kernels are for compute capability {names}, this device has {'.'.join(map(str, layer.capability))}"
    if layer.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 computes in bfloat16 or float16, not {str(layer.dtype).removeprefix('torch.')}"
    for what, size in (("queries", layer.size), ("values", layer.value_size)):
        if size % 8 or not 8 <= size <= 256:
            return f"FlashAttention-4 wants head sizes of 8 to 256 in steps of 8, the {what} have {size}"
    if layer.heads % layer.groups:
        return f"{layer.heads} query heads do not divide among {layer.groups} key-value heads"
    if layer.size != layer.value_size and (layer.heads != layer.groups or (layer.size, layer.value_size) != (192, 128)):
        return "it wants values of the queries' head size (or 128 with 192 and as many key-value heads as query heads)"
    if layer.bias:
        return "a bias for each pair of tokens is not among what its kernels add to scores"
    found = library()
    return found if isinstance(found, str) else None


def capping(softcap: float, backward: bool = False) -> dict[str, Callable]:
    """The kernels' arguments for a soft cap; 0 for none."""
    if not softcap:
        return {}
    from preftree.attention.flash_mask import softcap_functions

    cap, uncap = softcap_functions(softcap)
    return {"score_mod": cap, "score_mod_bwd": uncap} if backward else {"score_mod": cap}


def kernels() -> ModuleType:
    """The library's module of kernels, for those whom `refusal` did not refuse."""
    found = library()
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found
