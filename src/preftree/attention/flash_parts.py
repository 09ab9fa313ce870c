"""Parts of FlashAttention-4's kernels on Hopper that preftree has its own of, put in their places for compilations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any

_lock = Lock()


@cache
def parts() -> list[tuple[ModuleType, str, Any]]:
    """Modules, names in them, and what to put there; nothing that a release of the library has no like of."""
    found: list[tuple[ModuleType, str, Any]] = []
    try:
        from flash_attn.cute import flash_bwd_sm90

        from preftree.attention.flash_order import HeadsTogether

        found.append((flash_bwd_sm90, "SingleTileScheduler", HeadsTogether))
    except ImportError:
        pass
    try:
        from flash_attn.cute import flash_bwd_sm90, flash_fwd_sm90, mask

        from preftree.attention.flash_bits import TreeMask

        theirs, ours = (list(inspect.signature(kind.apply_mask).parameters) for kind in (mask.AttentionMask, TreeMask))
        if theirs == ours:
            found += [(module, "AttentionMask", TreeMask) for module in (flash_fwd_sm90, flash_bwd_sm90)]
    except ImportError:
        pass
    return [part for part in found if hasattr(part[0], part[1])]


def masks_are_own() -> bool:
    """Whether masks are among the parts."""
    return any(name == "AttentionMask" for _, name, _ in parts())


@contextmanager
def own_parts(masks: bool) -> Iterator[None]:
    """Kernels that are compiled within are made of these parts, ``masks`` or not; those of other callers keep the library's.

    A kernel that is compiled stays in the library's cache under its mask: only calls with preftree's masks find it.
    """
    with _lock:
        put = [part for part in parts() if masks or part[1] != "AttentionMask"]
        before = [(module, name, getattr(module, name)) for module, name, _ in put]
        try:
            for module, name, part in put:
                setattr(module, name, part)
            yield
        finally:
            for module, name, part in before:
                setattr(module, name, part)
