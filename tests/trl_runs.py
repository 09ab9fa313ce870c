"""The same training run by TRL and by preftree, and how far apart they end."""

from __future__ import annotations

import tempfile

import torch
import trl

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


def train(kind: str, model, train_dataset, own: dict | None = None, trainer_args: dict | None = None, **settings):
    """Train with "trl" or "preftree"; ``own`` are preftree's own settings, ``settings`` those of both."""
    config, trainer_class = (
        (trl.DPOConfig, trl.DPOTrainer) if kind == "trl" else (preftree.DPOConfig, preftree.DPOTrainer)
    )
    extra = (own or {}) if kind == "preftree" else {}
    args = config(output_dir=tempfile.mkdtemp(), **(COMMON | settings | extra))
    made = {name: value() if name == "peft_config" else value for name, value in (trainer_args or {}).items()}
    trainer = trainer_class(model() if callable(model) else model, args=args, train_dataset=train_dataset, **made)
    trainer.train()
    return trainer


def differences(one, other) -> tuple[float, float]:
    """Largest difference of any logged metric (relative above 1), and of any parameter relative to its largest entry.

    Fails if the two have not logged the same metrics at the same steps.
    """
    metrics = 0.0
    assert len(one.state.log_history) == len(other.state.log_history)
    for left, right in zip(one.state.log_history, other.state.log_history, strict=True):
        assert set(left) == set(right), set(left) ^ set(right)
        for name, value in left.items():
            if not any(time in name for time in _TIMES):
                metrics = max(metrics, abs(value - right[name]) / max(1.0, abs(value)))
    parameters = 0.0
    for (name, left), (twin, right) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert name == twin
        largest = left.detach().abs().max().clamp(min=1e-12)
        parameters = max(parameters, ((left - right).detach().abs().max() / largest).item())
    return metrics, parameters


def losses(trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
