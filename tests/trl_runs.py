"""The same training run by TRL and by preftree, and how far apart they end."""

from __future__ import annotations

import importlib
import os
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from preference_data import dataset

import preftree

COMMON = {
    "per_device_train_batch_size": 5,
    "per_device_eval_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 0.03,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "beta": 0.3,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
_TIMES = ("runtime", "per_second", "total_flos", "epoch")


def classes(kind: str, method: str):
    """Config and trainer of "trl" or "preftree" for a method: "DPO", "ORPO", "CPO", "TPO", "KTO" or "Reward"."""
    home = preftree if kind == "preftree" else trl
    if kind == "trl" and method in ("ORPO", "CPO", "TPO"):
        home = importlib.import_module(f"trl.experimental.{method.lower()}")
    return getattr(home, f"{method}Config"), getattr(home, f"{method}Trainer")


def train(
    kind: str,
    model,
    train_dataset,
    own: dict | None = None,
    trainer_args: dict | None = None,
    method: str = "DPO",
    resume: bool = False,
    **settings,
):
    """Train with "trl" or "preftree"; ``own`` are preftree's own settings, ``settings`` those of both."""
    trainer = construct(kind, model, train_dataset, own, trainer_args, method, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def construct(kind, model, train_dataset, own=None, trainer_args=None, method="DPO", **settings):
    """A trainer as `train` takes it."""
    config, trainer_class = classes(kind, method)
    extra = (own or {}) if kind == "preftree" else {}
    common = {name: value for name, value in COMMON.items() if name != "beta" or method != "Reward"}
    args = config(**({"output_dir": tempfile.mkdtemp()} | common | settings | extra))
    made = {name: value() if name == "peft_config" else value for name, value in (trainer_args or {}).items()}
    return trainer_class(model() if callable(model) else model, args=args, train_dataset=train_dataset, **made)


def end_of(trainer) -> dict:
    """What a run leaves behind: its log, and its weights by name."""
    weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return {"history": trainer.state.log_history, "weights": weights}


_last: dict[str, dict] = {}


def end_by_trl(model: str, data: list[dict], method: str = "DPO", **settings) -> dict:
    """What TRL's run leaves behind; tests that follow each other and want the same run share it."""
    key = repr((model, data, method, settings))
    if key not in _last:
        _last.clear()
        _last[key] = end_of(train("trl", model, dataset(data), method=method, **settings))
    return _last[key]


def differences(one, other, except_for: tuple[str, ...] = ()) -> tuple[float, float]:
    """Largest difference of any logged metric (relative above 1), and of any parameter relative to its largest entry.

    Takes trainers or what `end_of` gives; fails if the two have not logged the same metrics at the same steps. Metrics whose
    name holds one of ``except_for`` are not compared, nor is the share of rewards that are above others (a metric of signs)
    while the policy is the reference and rewards, on some processors, not all quite zero.
    """
    one, other = (run if isinstance(run, dict) else end_of(run) for run in (one, other))
    metrics = 0.0
    assert len(one["history"]) == len(other["history"])
    for left, right in zip(one["history"], other["history"], strict=True):
        assert set(left) == set(right), set(left) ^ set(right)
        left_out = (*_TIMES, *except_for, *_signs_of_rounding(left, right))
        for name, value in left.items():
            if not any(part in name for part in left_out):
                metrics = max(metrics, abs(value - right[name]) / max(1.0, abs(value)))
    assert one["weights"].keys() == other["weights"].keys()
    parameters = 0.0
    for name, left in one["weights"].items():
        largest = left.abs().max().clamp(min=1e-12)
        parameters = max(parameters, ((left - other["weights"][name]).abs().max() / largest).item())
    return metrics, parameters


def _signs_of_rounding(*entries) -> tuple[str, ...]:
    for prefix in ("", "eval_"):
        rewards = [abs(entry.get(f"{prefix}rewards/{of}", 1.0)) for entry in entries for of in ("chosen", "rejected")]
        # (Means of 0 may be of rewards that cancel: some are above others then, but not all. Of zeros none should be.)
        cancelled = max(rewards) == 0 and any(0 < entry.get(f"{prefix}rewards/accuracies", 0) < 1 for entry in entries)
        if cancelled or 0 < max(rewards) < 1e-6:
            return (f"{prefix}rewards/accuracies",)
    return ()


def losses(trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
