"""What is logged, and when the device is asked for it: losses that are not finite, metrics over several steps."""

import math

import pytest
from preference_data import dataset, text_pairs
from trl_runs import classes, construct, differences

from preftree.trainers.metrics import Unread


def trained(kind, model_path, lost=(), **settings):
    """A run whose micro-batches of the numbers ``lost`` have a loss that is not finite, with the gradients of the real one."""
    trainer = construct(kind, model_path, dataset(text_pairs(40)), per_device_train_batch_size=3, **settings)
    _, base = classes(kind, "DPO")
    seen = []

    class Losing(base):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.model.training:
                seen.append(len(seen))
                if seen[-1] in lost:
                    return loss + (math.nan if seen[-1] % 2 else math.inf)
            return loss

    trainer.__class__ = Losing
    trainer.train()
    return trainer


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lost", [(0,), (3,), (4, 5, 6, 7), (2, 9, 11)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"logging_nan_inf_filter": False}], ids=str)
def test_losses_that_are_not_finite(model_path, lost, settings):
    """As transformers logs them: by the mean of those since the last log, or as they are."""
    settings = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 6} | settings
    theirs, ours = (trained(kind, model_path, lost, **settings) for kind in ("trl", "preftree"))
    assert len(logged(ours)) == 3
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-4, nan_ok=True)
    assert all(math.isfinite(loss) for loss in logged(ours)) == settings.get("logging_nan_inf_filter", True)
    assert ours.args.logging_nan_inf_filter == settings.get("logging_nan_inf_filter", True)


def test_metrics_are_read_when_they_are_logged(model_path, monkeypatch):
    """Not step by step, where the device would be waited for."""
    read, steps = Unread.read, []
    monkeypatch.setattr(Unread, "read", lambda self: (steps.append(ours.state.global_step), read(self))[1])
    settings = {"logging_steps": 3, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    data = dataset(text_pairs(24))
    theirs, ours = (
        construct(kind, model_path, data, None, {"eval_dataset": data}, **settings) for kind in ("trl", "preftree")
    )
    theirs.train()
    ours.train()
    metrics, parameters = differences(theirs, ours)
    assert max(metrics, parameters) <= 1e-4
    assert set(steps) == {2, 3, 4, 6}
