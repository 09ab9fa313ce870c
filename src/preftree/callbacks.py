"""What the command line adds to a training run: a line for each log, and Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import sys
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from preftree.trainers.ranks import HostExchange


class Progress(ProgressCallback):
    """Transformers' progress bar, with loss and margin beside it and one short line a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}loss" not in logs:
            return
        names = (
            ("loss", "loss"),
            ("margin", "rewards/margins"),
            ("accuracy", "rewards/accuracies"),
            ("margin", "margin"),  # of rewards, by the reward trainer's names
            ("accuracy", "accuracy"),
        )
        text = "  ".join(f"{name} {float(logs[prefix + key]):.4f}" for name, key in names if prefix + key in logs)
        line = f"step {state.global_step:>5}  {'held out  ' if prefix else ''}{text}"
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line)


class Interrupt(TrainerCallback):
    """Ctrl-C ends the step that is running, saves a checkpoint and stops, all ranks after the same step; a second one stops at
    once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.exchange: HostExchange | None = None

    def _handle(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\ninterrupted: saving a checkpoint after this step (again to stop at once)", file=sys.stderr)

    def on_train_begin(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        if self.exchange is not None:
            self.asked = bool(self.exchange.gather([self.asked]).any())
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, signal.default_int_handler)
