"""Modules of kernels, where the packages that they are written with are installed."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable
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
    """A module of kernels by its full name, or None without Triton or whatever else it imports.

    A package that is installed and does not load, or is not the one that is needed, is warned of.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("preftree"):
            raise  # no such module here, whatever is installed
        if not _not_installed(error):
            warnings.warn(f"without the kernels of {module}, which is slower: {error}", UserWarning, stacklevel=2)
        return None


def _not_installed(error: ImportError) -> bool:
    """Whether a module of ours imports a package that is not there at all."""
    package = (error.name or "").partition(".")[0]
    if not package or find_spec(package) is not None:
        return False
    places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [place for place in places if not place.startswith("importlib")]
    return ours[-1].startswith("preftree")


def kernels_for(x: torch.Tensor, module: str) -> Any:
    """`kernels_of` for where a tensor is: None on a CPU."""
    return kernels_of(module) if x.is_cuda else None


def relative_errors(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> list[float]:
    """Norms of the differences over those of what was expected."""
    pairs = zip(found, expected, strict=True)
    return [float((one - other).float().norm() / other.float().norm()) for one, other in pairs]


def works(trial: Callable[[], list[float]], warning: str) -> bool:
    """Whether a trial's relative errors are those of half precision; otherwise, or if it raises, it is warned of."""
    try:
        errors = trial()
        wrong = "" if all(error < 0.02 for error in errors) else f"their relative error is {max(errors):.2g}"
    except Exception as raised:
        wrong = f"{type(raised).__name__}: {raised}"
    if wrong:
        warnings.warn(f"{warning}: {wrong}", UserWarning, stacklevel=3)
    return not wrong
