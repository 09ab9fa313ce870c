"""What ranks do together: when engines exchange gradients, and what hosts tell each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import DistributedType
from torch import distributed
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
        self._group: Any = None
        # Ranks without GPUs meet as hosts anyway.
        self._apart = accelerator.device.type == "cuda" and distributed.is_gloo_available()

    def gather(self, numbers: Sequence[float]) -> torch.Tensor:
        """Each rank's numbers, float64 ``[ranks, n]`` on the CPU. All ranks call it, with as many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        ranks = self._accelerator.num_processes
        if ranks == 1:
            return own[None]
        if self._apart and self._group is None:
            try:
                self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
            except RuntimeError as error:  # no network interface that it finds by itself
                self._apart = False
                logger.warning(
                    f"hosts do not meet by gloo (GLOO_SOCKET_IFNAME names an interface), GPUs wait instead: {error}"
                )
        if not self._apart:
            return self._accelerator.gather(own[None].to(self._accelerator.device)).cpu()
        found = [torch.empty_like(own) for _ in range(ranks)]
        distributed.all_gather(found, own, group=self._group)
        return torch.stack(found)


@contextlib.contextmanager
def to_be_continued(accelerator: Any, model: torch.nn.Module) -> Iterator[None]:
    """While inside, gradients are added up and not exchanged: further ones of the same micro-batch follow."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        with accelerator.no_sync(model):
            yield
        return
    # Its engine steps after each backward pass that nothing follows.
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


@contextlib.contextmanager
def gradients_apart(model: torch.nn.Module, tp_size: int) -> Iterator[None]:
    """While inside, tensor parallelism over ``tp_size`` ranks does not see gradients that there are already.

    Where a rank's gradient is a part of the whole (norms of heads), transformers adds up what ranks have after each backward
    pass: together with earlier gradients, which have been added up before.
    """
    if tp_size == 1:
        yield
        return
    hooked = [each for each in model.parameters() if each._post_accumulate_grad_hooks and each.grad is not None]
    before = [parameter.grad for parameter in hooked]
    for parameter in hooked:
        parameter.grad = None
    yield
    for parameter, gradient in zip(hooked, before, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
