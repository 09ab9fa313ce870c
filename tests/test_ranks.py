"""Two processes (gloo; DDP, FSDP2): the same as TRL's two, also where ranks need different numbers of rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_runs import differences

SCRIPT = Path(__file__).with_name("run_on_ranks.py")


def two_ranks(kind, tmp_path, **settings):
    out = tmp_path / f"{kind}.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(SCRIPT), kind, json.dumps(settings), str(out)]
    subprocess.run(command, check=True, timeout=300, cwd=SCRIPT.parent)
    return torch.load(out)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1},
        {"loss_type": ["aot", "sft"], "gradient_checkpointing": True},
        {"method": "ORPO", "learning_rate": 0.01},
        {"method": "KTO", "learning_rate": 0.01},
        {"method": "KTO", "precompute_ref_log_probs": True, "learning_rate": 0.01},
        {"method": "Reward", "learning_rate": 1e-3},
        {"engine": "fsdp2", "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1},
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
