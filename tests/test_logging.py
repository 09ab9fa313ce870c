"""What is logged, and when the device is asked for it: losses that are not finite, metrics over several steps."""

import math

import pytest
import torch
from preference_data import dataset, text_pairs
from trl_runs import classes, construct, differences

from preftree.trainers import metrics


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


def test_ranks_put_their_metrics_together():
    """What ranks hold of a metric, some of them nothing, against what all values give together."""
    per_rank = [torch.tensor([1.0, 5.0, -2.0]), torch.tensor([]), torch.tensor([3.0])]
    every = torch.cat(per_rank)

    def of_rank(values):
        positive = values > 0
        above = metrics.ratio_if_any(values[positive].sum(), positive.sum())
        below = metrics.ratio_if_any(values[~positive].sum(), (~positive).sum())
        none = metrics.ratio_if_any(torch.zeros(()), torch.zeros(()))
        return {
            "mean": metrics.mean(values),
            "of ranks": metrics.mean_of_ranks(values.sum()),
            "smallest": metrics.smallest(values),
            "largest": metrics.largest(values),
            "below": below,
            "margin": metrics.difference_if_any(above, below),
            "none": none,
            "no margin": metrics.difference_if_any(above, none),
            "zero": metrics.ratio(torch.zeros(()), torch.zeros(())),
        }

    kept = [[metrics.Unread.of(of_rank(each)) for each in (values, 2 * values)] for values in per_rank]
    gather = iter([torch.stack([torch.cat([each.parts for each in own]) for own in kept])])
    first, second = metrics.read(kept[0], lambda own: next(gather))
    below = every[every <= 0].mean().item()
    expected = {"mean": every.mean().item(), "of ranks": every.sum().item() / 3, "smallest": -2.0, "largest": 5.0}
    expected |= {"below": below, "margin": every[every > 0].mean().item() - below, "zero": 0.0}
    assert first == pytest.approx(expected)
    assert second == pytest.approx({name: 2 * value for name, value in expected.items()})
    assert metrics.read([], None) == []


def test_metrics_are_read_when_they_are_logged(model_path, monkeypatch):
    """Not step by step, where the device would be waited for."""
    steps = []

    def read(unread, gather):
        steps.extend([ours.state.global_step] * bool(unread))
        return metrics.read(unread, gather)

    monkeypatch.setattr("preftree.trainers.logged.read", read)
    settings = {"logging_steps": 3, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    data = dataset(text_pairs(24))
    theirs, ours = (
        construct(kind, model_path, data, None, {"eval_dataset": data}, **settings) for kind in ("trl", "preftree")
    )
    theirs.train()
    ours.train()
    assert max(differences(theirs, ours)) <= 1e-4
    assert steps == [2, 2, 3, 4, 4, 6, 6]
