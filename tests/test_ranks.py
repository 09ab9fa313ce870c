"""Two processes (gloo; DDP, FSDP2): the same as TRL's two, also where ranks need different numbers of rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_runs import differences

SCRIPT = Path(__file__).with_name("run_on_ranks.py")


def run_on(ranks, kind, tmp_path, **settings):
    out = tmp_path / f"{kind}-{ranks}.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(SCRIPT), kind, json.dumps(settings), str(out)]
    subprocess.run(command, check=True, timeout=300, cwd=SCRIPT.parent)
    return torch.load(out)


def two_ranks(kind, tmp_path, **settings):
    return run_on(2, kind, tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 1},
        {"loss_type": ["aot", "sft"], "gradient_checkpointing": True},
        {"method": "ORPO", "learning_rate": 0.01},
        {"method": "KTO", "learning_rate": 0.01},
        {"method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01},
        {"method": "Reward", "learning_rate": 1e-3},
        {"engine": "fsdp2", "gradient_accumulation_steps": 2, "max_steps": 1},
        {"engine": "fsdp2", "loss_type": ["aot", "sft"], "gradient_checkpointing": True},
        {"engine": "fsdp2", "method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01},
    ],
    ids=[
        *["accumulation", "two-passes", "orpo", "kto", "kto-cached", "reward"],
        *["fsdp2-accumulation", "fsdp2-two-passes", "fsdp2-kto-cached"],
    ],
)
def test_two_ranks(model_path, tmp_path, settings):
    settings = settings | {"model": model_path, "per_device_train_batch_size": 4}
    # TRL's own cache fails there: each rank looks for it in a folder of its own.
    stock = {name: value for name, value in settings.items() if name != "precompute_ref_log_probs"}
    theirs = two_ranks("trl", tmp_path, **stock)
    ours = two_ranks("preftree", tmp_path, own={"row_length": 64}, **settings)
    metrics, weights = differences(theirs, ours, ("logits/",) if settings.get("method") == "ORPO" else ())
    assert metrics <= 1e-5
    assert weights <= 1e-5
    # Collectives inside the model (FSDP) want as many forward passes on every rank.
    first, second = ours["rows"]
    assert first == second > 3


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen2_5_vl", True), ("llava", False)])
def test_images_on_two_ranks(tmp_path, family, checkpointing):
    """Some batches of a rank have no images, some of both ranks: the tower's gradients are exchanged all the same."""
    settings = {"images": family, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    settings |= {"train_sampling_strategy": "sequential"}
    theirs = two_ranks("trl", tmp_path, **settings)
    ours = two_ranks("preftree", tmp_path, own={"row_length": 64}, gradient_checkpointing=checkpointing, **settings)
    assert max(differences(theirs, ours)) <= 1e-5


@pytest.mark.parametrize(
    ("engine", "ranks", "examples", "settings"),
    [
        ("ddp", 2, 23, {}),
        ("ddp", 4, 17, {"gradient_accumulation_steps": 2}),  # one example is left for the last step's four ranks
        ("fsdp2", 2, 17, {"loss_type": ["ipo"]}),
        ("fsdp2", 4, 23, {"precompute_ref_log_probs": True, "gradient_checkpointing": True}),
    ],
)
def test_the_number_of_ranks_changes_nothing(model_path, tmp_path, engine, ranks, examples, settings):
    """Not even where the last step has too few examples: none is repeated, and each counts the same."""
    settings = {"model": model_path, "examples": examples, "learning_rate": 0.003} | settings
    settings |= {"max_steps": -1, "num_train_epochs": 2}
    one = run_on(1, "preftree", tmp_path, per_device_train_batch_size=8, **settings)
    several = run_on(
        ranks,
        "preftree",
        tmp_path,
        engine=engine,
        per_device_train_batch_size=8 // ranks,
        own={"row_length": 96},
        **settings,
    )
    losses = [[log["loss"] for log in end["history"] if "loss" in log] for end in (one, several)]
    assert len(losses[0]) == len(losses[1]) >= 4
    assert max(abs(a - b) / max(abs(a), 1) for a, b in zip(*losses, strict=True)) <= 1e-6
    # (The first step's rewards are zeros but for rounding, and so the larger one is chance.)
    metrics, weights = differences(one, several, ("rewards/accuracies",))
    assert metrics <= 1e-5
    assert weights <= 1e-6
