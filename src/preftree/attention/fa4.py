"""FlashAttention-4 (the package flash-attn-4), as far as `flash` and `varlen` share it."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

from preftree.attention.layer import Layer
from preftree.cache import cache_folder

# What the kernels are called with; older releases lack some of it.
_NEEDED = ("mask_mod", "aux_scalars", "block_sparse_tensors", "learnable_sink", "cu_seqlens_q")


@cache
def library() -> ModuleType | str:
    """The library's module of kernels, or why it cannot be used."""
    try:
        with kernels_kept():
            from flash_attn.cute import interface
    except ImportError as error:
        return f"flash-attn-4 is not installed or does not load ({error}): pip install 'preftree[flash]'"
    for function in (interface._flash_attn_fwd, interface._flash_attn_bwd):
        missing = [name for name in _NEEDED if name not in inspect.signature(function).parameters]
        if missing:
            return f"this flash-attn-4 lacks {', '.join(missing)}: preftree needs 4.0.0b36 or later"
    return interface


@contextmanager
def kernels_kept() -> Iterator[None]:
    """While the library is imported: that it keeps compiled kernels on the disk, for the next process.

    They are some seconds' work each. Where they lie is the user's to say, by the library's own variables.
    """
    names = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    folder = None if any(name in os.environ for name in names) else _cache_folder()
    if folder is None:
        yield
        return
    os.environ.update(zip(names, ("1", str(folder)), strict=True))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _cache_folder() -> Path | None:
    """A folder of the user's own in which files can be locked, which the library does."""
    if (folder := cache_folder("flash-attention")) is None:
        return None
    try:
        import fcntl  # not on every system

        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return None
    return folder


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


def whole_size(size: int) -> int:
    """The head size that kernels are given for layers of a head size, see `widened`."""
    return -(-size // 32) * 32 if -(-size // 16) % 2 else size


def widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[B, H, S, D]`` with zeros behind what heads hold, at sizes whose gradients the kernels get wrong: 8, 16, 40, 48, ...

    The library's backward pass on Hopper writes sums in lines of whole 16 numbers and reads them in lines of whole 32; where
    these are not the same, gradients of queries (and of grouped keys) come out wrong without an error (seen in 4.0.0b36).
    Zeros change neither scores nor outputs.
    """
    missing = [whole_size(x.shape[-1]) - x.shape[-1] for x in tensors]
    return tuple(
        torch.nn.functional.pad(x.transpose(1, 2), (0, more)).transpose(1, 2) if more else x
        for x, more in zip(tensors, missing, strict=True)
    )


def narrowed(x: torch.Tensor, size: int) -> torch.Tensor:
    """What kernels gave for `widened` heads of ``size``."""
    return x if x.shape[-1] == size else x[..., :size]


def capping(softcap: float | None, backward: bool = False) -> dict[str, Callable]:
    """The kernels' arguments for a soft cap, or for none."""
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


@dataclass(frozen=True)
class TiledSums:
    """Gradients of keys or values as the kernel adds them up over query heads, before their type is converted.

    Block ``b`` of queries has its keys from line ``(key_starts[b] + b * step) // step * step`` on, in whole tiles. Element
    ``(key, d)`` of a tile lies ``order[key, d]`` elements behind the tile's first, the order being the kernel's own.

    Attributes:
        sums: ``[G, lines * line]``, float32.
        order: ``[tile, D]``, int32.
        step: to how many lines a block's keys are aligned.
        line: elements of a line.
        scale: what the sums are to be multiplied by.
    """

    sums: torch.Tensor
    order: torch.Tensor
    step: int
    line: int
    scale: float


def backward(*args: Any, dk: torch.Tensor, dv: torch.Tensor, **options: Any) -> tuple[tuple, dict[str, TiledSums]]:
    """The library's backward pass ``(dq, dk, dv, ...)``; of ``"dk"`` and ``"dv"`` the sums in float32, where it has them.

    It has them for grouped heads. ``dk`` and ``dv`` are not written then: who adds up copies of keys rounds once, not each
    copy and then the sum.
    """
    library = kernels()
    held: dict[str, TiledSums] = {}

    def convert(sums, output, scale, starts, used, *kernel, **more):
        name = "dk" if output is dk else "dv" if output is dv else None
        layout = None if name is None else _layout(library, output, kernel, more)
        if name is None or layout is None:
            library._bwd_postprocess_convert(sums, output, scale, starts, used, *kernel, **more)
        else:
            held[name] = TiledSums(sums, *layout, scale)

    # A copy of the function that calls another conversion: the library itself stays as it is.
    original = library._flash_attn_bwd
    names = {**vars(library), "_bwd_postprocess_convert": convert}
    function = FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    function.__kwdefaults__ = original.__kwdefaults__
    return function(*args, dk=dk, dv=dv, **options), held


_layouts: dict[tuple, tuple[torch.Tensor, int, int] | None] = {}


def _layout(library: ModuleType, like: torch.Tensor, kernel: tuple, more: dict) -> tuple[torch.Tensor, int, int] | None:
    """``(order, step, line)`` of `TiledSums` as the library's conversion reads them; None if they are not laid out so.

    The conversion is given the numbers of the elements, which shows where it takes each from: two blocks of keys, one key
    and a tile and a key, in three passes, since its types hold integers up to 256. That reads back from the device, once.
    """
    _, _, size, tile, *_ = kernel  # architecture, type, head size, lines of a tile, ...
    more = {**more, "cu_total_m_blocks": None}
    key = (like.device, like.dtype, *kernel, *sorted((name, str(value)) for name, value in more.items()))
    if key not in _layouts:
        multiple = more.get("hdim_multiple_of", 32)
        line, step = -(-size // multiple) * multiple, tile * more.get("cluster_size", 1)
        starts = torch.tensor([0, 1, tile + 2], dtype=torch.int32, device=like.device)
        lines = -(-(tile + 2 + 3 * step) // step) * step
        numbers = torch.arange(lines * line, device=like.device)
        found = torch.zeros(tile + 2, size, dtype=torch.int64, device=like.device)
        for power in (1, 256, 65536):
            digits = (numbers // power % 256).float()[None]
            taken = torch.zeros(tile + 2, 1, size, dtype=like.dtype, device=like.device)
            library._bwd_postprocess_convert(digits, taken, 1.0, starts, None, *kernel, **more)
            found += taken[:, 0].long() * power
        first = (1 + step) // step * step * line
        order = found[1 : tile + 1] - first
        regular = (
            bool(((order >= 0) & (order < tile * line)).all())
            and bool((found[0] == order[0]).all())
            and bool((found[tile + 1] == first + tile * line + order[0]).all())
        )
        _layouts[key] = (order.int().contiguous(), step, line) if regular else None
    return _layouts[key]
