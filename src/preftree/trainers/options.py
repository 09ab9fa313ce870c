"""Options of transformers' whose mistakes it would find after models and data are loaded, and not by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch._inductor import list_mode_options
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.utils.logging import get_log_levels_dict

# Beside what is in the signature of PyTorch's `checkpoint`.
_OF_CHECKPOINTS = {"preserve_rng_state", "every_n_layers"}


def check_options(args: Any) -> None:
    """Raise `ValueError` naming an option of transformers' `TrainingArguments` that no training could begin with."""
    for name, check in _CHECKS.items():
        given = getattr(args, name)
        try:
            check(given, args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"option {name!r} cannot be {given!r}: {error}") from error


def _check_optim_args(given: Any, args: Any) -> None:
    for part in (given or "").replace(" ", "").split(","):
        if part and part.count("=") != 1:
            raise ValueError(f"{part!r} is not of the form name=value")


def _as_mapping(given: Any) -> dict[str, Any]:
    if not isinstance(given or {}, dict):
        raise ValueError("it must be a mapping")
    return dict(given or {})


def _check_scheduler(given: Any, args: Any) -> None:
    settings = _as_mapping(given)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with contextlib.suppress(ValueError):  # which may be about rates, or numbers of steps, not known yet
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=settings)


def _check_checkpoints(given: Any, args: Any) -> None:
    settings = _as_mapping(given)
    known = set(signature(checkpoint).parameters) - {"function", "args", "kwargs"} | _OF_CHECKPOINTS
    if args.gradient_checkpointing and (unknown := sorted(set(settings) - known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}")


def _one_of(known: Callable[[], Iterable[str]], read: Callable[[str], str] = str) -> Callable[[Any, Any], None]:
    def check(given: Any, args: Any) -> None:
        if given is not None and read(given) not in (names := list(known())):
            raise ValueError(f"choose from {', '.join(names)}")

    return check


_log_level = _one_of(lambda: [*get_log_levels_dict(), "passive"])
_CHECKS: dict[str, Callable[[Any, Any], None]] = {
    "optim_args": _check_optim_args,
    "lr_scheduler_kwargs": _check_scheduler,
    "gradient_checkpointing_kwargs": _check_checkpoints,
    "torch_compile_mode": _one_of(list_mode_options),
    "torch_compile_backend": _one_of(DynamoBackend.list, str.upper),
    "log_level": _log_level,
    "log_level_replica": _log_level,
}
