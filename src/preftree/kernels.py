"""Modules of Triton kernels, where Triton is installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def triton_kernels(module: str) -> Any:
    """A module of Triton kernels by its full name, or None without Triton."""
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("preftree"):
            raise  # no such module here, whatever is installed
        return None
