"""Modules of kernels, where the packages that they are written with are installed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def kernels_of(module: str) -> Any:
    """A module of kernels by its full name, or None without Triton or whatever else it imports."""
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("preftree"):
            raise  # no such module here, whatever is installed
        return None


def kernels_for(x: torch.Tensor, module: str) -> Any:
    """`kernels_of` for where a tensor is: None on a CPU."""
    return kernels_of(module) if x.is_cuda else None
