"""What ranks tell each other of what their hosts know: a GPU is not waited for, as it is in collectives of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


class HostExchange:
    """Numbers of all ranks, from host to host.

    Args:
        accelerator: whose processes these are.
        timeout: seconds that ranks wait for each other (`TrainingArguments.ddp_timeout`).
    """

    def __init__(self, accelerator: Any, timeout: float) -> None:
        self._accelerator, self._timeout = accelerator, timeout
        self._group: Any = None

    def gather(self, numbers: Sequence[float]) -> torch.Tensor:
        """Each rank's numbers, float64 ``[ranks, n]`` on the CPU. All ranks call it, with as many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        ranks = self._accelerator.num_processes
        if ranks == 1:
            return own[None]
        if self._accelerator.device.type != "cuda" or not distributed.is_gloo_available():
            return self._accelerator.gather(own[None].to(self._accelerator.device)).cpu()
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout))
        found = [torch.empty_like(own) for _ in range(ranks)]
        distributed.all_gather(found, own, group=self._group)
        return torch.stack(found)
