"""What ranks do together: when engines exchange gradients, and what hosts tell each other."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import DistributedType
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

logger = logging.get_logger(__name__)


class HostExchange:
    """Numbers of all ranks, from host to host: a GPU is not waited for, as it is in collectives of its own.

    Args:
        accelerator: whose processes these are.
        timeout: seconds that ranks wait for each other (`TrainingArguments.ddp_timeout`).
    """

    def __init__(self, accelerator: Any, timeout: float) -> None:
        self._accelerator, self._timeout = accelerator, timedelta(seconds=timeout)
        self._groups: list[Any] = []  # one, once ranks have met
        weakref.finalize(self, _leave, self._groups)
        # Ranks without GPUs meet as hosts anyway.
        self._apart = accelerator.device.type == "cuda" and distributed.is_gloo_available()

    def gather(self, numbers: Sequence[float]) -> torch.Tensor:
        """Each rank's numbers, float64 ``[ranks, n]`` on the CPU. All ranks call it, with as many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        ranks = self._accelerator.num_processes
        if ranks == 1:
            return own[None]
        if self._apart and not self._groups:
            try:
                self._groups.append(distributed.new_group(backend="gloo", timeout=self._timeout))
            except RuntimeError as error:  # no network interface that it finds by itself
                self._apart = False
                logger.warning(
                    f"hosts do not meet by gloo (GLOO_SOCKET_IFNAME names an interface), GPUs wait instead: {error}"
                )
        if not self._apart:
            return self._accelerator.gather(own[None].to(self._accelerator.device)).cpu()
        found = [torch.empty_like(own) for _ in range(ranks)]
        distributed.all_gather(found, own, group=self._groups[0])
        return torch.stack(found)


def _leave(groups: list[Any]) -> None:
    """End groups of processes. (One whose threads outlive the interpreter may abort the process at its end.)"""
    while groups:
        with contextlib.suppress(ValueError):  # ended by somebody else
            distributed.destroy_process_group(groups.pop())


@contextlib.contextmanager
def to_be_continued(accelerator: Any, model: torch.nn.Module) -> Iterator[None]:
    """While inside, gradients are added up and not exchanged: further ones of the same micro-batch follow.

    They are exchanged nevertheless where accelerate is told to (`sync_each_batch`): with FSDP2, ranks then hold their share of
    them alone.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Its engine steps after each backward pass that nothing follows.
        state = accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)
        return
    exchanged = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    with _kept_whole(model), contextlib.nullcontext() if exchanged else _added_up(accelerator, model):
        yield


@contextlib.contextmanager
def _added_up(accelerator: Any, model: torch.nn.Module) -> Iterator[None]:
    """While inside, gradients are not exchanged."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        # Those of a micro-batch that others of its step follow are not exchanged with its last row, either.
        model.set_requires_gradient_sync(accelerator.sync_gradients)


@contextlib.contextmanager
def _kept_whole(model: torch.nn.Module) -> Iterator[None]:
    """While inside, weights that FSDP2 leaves whole between a forward and a backward pass stay so behind the latter, too."""
    if not isinstance(model, FSDPModule):
        yield
        return
    kept: list[FSDPModule] = []

    def keep(*_: Any) -> None:
        for part in model.modules():
            if isinstance(part, FSDPModule) and not any(isinstance(each, DTensor) for each in _own_parameters(part)):
                part.set_reshard_after_backward(False, recurse=False)
                kept.append(part)

    after_forward = model.register_forward_hook(keep)
    try:
        yield
    finally:
        after_forward.remove()
        for part in kept:
            part.set_reshard_after_backward(True, recurse=False)


def _own_parameters(part: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Those that FSDP2 gathers with a module itself, not with one inside it."""
    yield from part.parameters(recurse=False)
    for child in part.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def now(device: torch.device) -> torch.Event | None:
    """An event that marks what a device has been given to do so far; None for CPUs."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event


@contextlib.contextmanager
def unchanged_since(event: torch.Event | None, *models: torch.nn.Module | None) -> Iterator[None]:
    """While inside, FSDP2 gathers models' weights for a forward pass ahead of what the device was given to do since an event.

    It waits for all of it otherwise, as an optimizer may have changed them.
    """
    sharded: list[Any] = [] if event is None else [model for model in models if isinstance(model, FSDPModule)]
    for model in sharded:
        model.set_post_optim_event(event)
    try:
        yield
    finally:
        for model in sharded:  # one that did not run has not taken it
            model.set_post_optim_event(None)


def adds_in_place(accelerator: Any, model: torch.nn.Module, last: bool) -> bool:
    """Whether the backward pass of a row may add to gradients itself: where nobody but autograd keeps them before it ends.

    FSDP2 takes what there is after a layer's pass; DDP takes them one by one with the last row.
    """
    if isinstance(model, DistributedDataParallel):
        return not last
    return accelerator.distributed_type == DistributedType.NO or isinstance(model, FSDPModule)


@contextlib.contextmanager
def gradients_apart(model: torch.nn.Module, tp_size: int) -> Iterator[None]:
    """While inside, tensor parallelism over ``tp_size`` ranks does not see gradients that there are already.

    Where a rank's gradient is a part of the whole (norms of heads), transformers adds up what ranks have after each backward
    pass: together with earlier gradients, which have been added up before.
    """
    if tp_size == 1:
        yield
        return
    before: dict[torch.nn.Parameter, Any] = {
        parameter: parameter.grad
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        # (The hook is the parameter's, with transformers 5.17 its module's.)
        if parameter.grad is not None and (parameter._post_accumulate_grad_hooks or module._backward_hooks)
    }
    for parameter in before:
        parameter.grad = None
    yield
    for parameter, gradient in before.items():
        parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
