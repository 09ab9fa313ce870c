"""`LogsLate`: losses and metrics stay on the device until something is logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from transformers import Trainer

from preftree.trainers.finite import FiniteLosses
from preftree.trainers.metrics import Metrics, Unread, read


class LogsLate(Trainer):
    """A trainer that does not wait for its device after each micro-batch, to know what it will log."""

    _metrics: dict[str, Any]  # of what TRL's `log` takes means

    @cached_property
    def _unread(self) -> list[tuple[str, Unread]]:
        """Metrics that have been kept since the last log, with the mode they belong to."""
        return []

    @cached_property
    def _finite_losses(self) -> FiniteLosses:
        return FiniteLosses(False)

    def _inner_training_loop(self, *args, **kwargs):
        self._finite_losses = FiniteLosses(self.args.logging_nan_inf_filter)
        with self._nan_inf_filter(False):
            return super()._inner_training_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _nan_inf_filter(self, on: bool) -> Iterator[None]:
        """While inside, transformers filters losses or not: it would wait for the device after each micro-batch."""
        given, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, on
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = given

    def evaluation_loop(self, *args, **kwargs):
        with self._nan_inf_filter(self.args.logging_nan_inf_filter or self._finite_losses.on):
            output = super().evaluation_loop(*args, **kwargs)
        self._read_metrics()
        return output

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control, ends = self.control, self.state.global_step >= self.state.max_steps
        if control.should_log or control.should_evaluate or control.should_training_stop or ends:
            self._read_metrics()
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if self.args.world_size == 1:  # (several ranks have read them: not all of them may log)
            self._read_metrics()
        if "loss" in logs:
            self._finite_losses.begin(self.state.global_step)
        return super().log(logs, *args, **kwargs)

    def _keep_metrics(self, values: Metrics, mode: str) -> None:
        """Keep a micro-batch's metrics for `log`; until then the device is not asked for them."""
        self._unread.append((mode, Unread.of(values)))

    def _read_metrics(self) -> None:
        """Hand what has been kept to TRL's `log`. All ranks do."""
        numbers = read([metrics for _, metrics in self._unread], self.accelerator.gather)
        for (mode, _), values in zip(self._unread, numbers, strict=True):
            self._store_metrics(values, mode)
        self._unread.clear()

    def _store_metrics(self, values: dict[str, float], mode: str) -> None:
        """Hand numbers to what TRL's `log` takes means of."""
        for name, value in values.items():
            self._metrics[mode][name].append(value)

    def _numbers(self, values: Metrics) -> dict[str, float]:
        """Metrics at once."""
        return read([Unread.of(values)], self.accelerator.gather)[0]
