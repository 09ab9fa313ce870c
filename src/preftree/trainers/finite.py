"""transformers' `logging_nan_inf_filter` without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class FiniteLosses:
    """Losses that are logged: one that is not finite counts as the mean of those since the last log.

    transformers asks the device for each micro-batch's loss, and so waits for its backward pass before the next one is
    prepared; here the device decides.

    Attributes:
        on: `TrainingArguments.logging_nan_inf_filter`.
        since: step of the last log, None before the first micro-batch.
        total: of the losses since then.
    """

    on: bool
    since: int | None = None
    total: torch.Tensor | float = 0.0

    def begin(self, step: int) -> None:
        """Losses up to ``step`` have been logged."""
        self.since, self.total = step, 0.0

    def replace(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """A micro-batch's loss in training step ``step``, or what stands for it."""
        if not self.on:
            return loss
        if self.since is None:
            self.since = step
        loss = torch.where(loss.isfinite(), loss, torch.as_tensor(self.total / (1 + step - self.since)).to(loss))
        self.total = self.total + loss.detach()
        return loss
