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
        try:
            check(args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"option {name!r} cannot be {getattr(args, name)!r}: {error}") from error


def _check_optim_args(args: Any) -> None:
    for part in (args.optim_args or "").replace(" ", "").split(","):
        if part and part.count("=") != 1:
            raise ValueError(f"{part!r} is not of the form name=value")


def _check_scheduler(args: Any) -> None:
    settings = args.lr_scheduler_kwargs or {}
    if not isinstance(settings, dict):
        raise ValueError("it must be a mapping")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    with contextlib.suppress(ValueError):  # which may be about numbers of steps, not known yet
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=dict(settings))


def _check_checkpoints(args: Any) -> None:
    settings = args.gradient_checkpointing_kwargs or {}
    if not isinstance(settings, dict):
        raise ValueError("it must be a mapping")
    known = set(signature(checkpoint).parameters) - {"function", "args", "kwargs"} | _OF_CHECKPOINTS
    if args.gradient_checkpointing and (unknown := sorted(set(settings) - known)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(sorted(known))}")


def _one_of(name: str, known: Callable[[], Iterable[str]], read: Callable[[str], str] = str) -> Callable[[Any], None]:
    def check(args: Any) -> None:
        given = getattr(args, name)
        if given is not None and read(given) not in (names := list(known())):
            raise ValueError(f"choose from {', '.join(names)}")

    return check


def _log_levels() -> list[str]:
    return [*get_log_levels_dict(), "passive"]


_CHECKS: dict[str, Callable[[Any], None]] = {
    "optim_args": _check_optim_args,
    "lr_scheduler_kwargs": _check_scheduler,
    "gradient_checkpointing_kwargs": _check_checkpoints,
    "torch_compile_mode": _one_of("torch_compile_mode", list_mode_options),
    "torch_compile_backend": _one_of("torch_compile_backend", DynamoBackend.list, str.upper),
    "log_level": _one_of("log_level", _log_levels),
    "log_level_replica": _one_of("log_level_replica", _log_levels),
}
