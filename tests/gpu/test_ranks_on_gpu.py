"""Ranks on GPUs (NCCL), one on each that there is, DDP and FSDP2: as one process; sharded layers run compiled, too."""

import pytest
import torch
from conftest import word_tokenizer
from families import saved_model
from run_on_ranks import launch_once
from trl_runs import differences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EXAMPLES = 23
EVERY_SECOND = {"eval_steps": 2, "save_steps": 2}
SETTINGS = {
    "exact": {"compile_layers": False},
    "compiled": {},
    "checkpointing": {"gradient_checkpointing": True},
    "cached": {"precompute_ref_log_probs": True},
    # (Saving shares out again what evaluation has left whole.)
    "chunks": {"chunks": True, "evaluated": 16, "eval_strategy": "steps", "save_strategy": "steps"} | EVERY_SECOND,
    "bf16": {"bf16": True, "attention_backend": "flash"},
    # (What fuses products wants weights of two bytes.)
    "bf16-weights": {"model_init_kwargs": {"dtype": "bfloat16"}, "attention_backend": "flash"},
    "whole": {"environment": {"FSDP_RESHARD_AFTER_FORWARD": "false"}},
    "offloaded": {"environment": {"FSDP_OFFLOAD_PARAMS": "true"}},
}
OF_SHARDS = ("whole", "offloaded")
# Which ones the same processes make. (Those that offload have to know from their start.)
LAUNCHES = (
    ("exact", "compiled", "checkpointing", "cached"),
    ("chunks", "bf16", "bf16-weights", "whole"),
    ("offloaded",),
)
OWN = ("attention_backend", "compile_layers")
# Of logged metrics (relative above 1), and of weights relative to their largest entry.
CLOSE = {"bf16": (0.05, 0.01), "bf16-weights": (0.05, 0.02)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Qwen3 whose heads are large enough for all kernels."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    return saved_model("qwen3", folder, word_tokenizer(), hidden_size=256, head_dim=64)


def runs(path, engine, ranks, names):
    """Settings of runs, by name."""
    common = {"kind": "preftree", "engine": engine}
    common |= {"model": path, "examples": EXAMPLES, "use_cpu": False, "tf32": False, "learning_rate": 1e-3, "beta": 0.1}
    common |= {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8 // ranks}
    common["per_device_eval_batch_size"] = 8 // ranks
    found = {}
    for name in names:
        settings = SETTINGS[name]
        own = {key: value for key, value in settings.items() if key in OWN}
        rest = {key: value for key, value in settings.items() if key not in OWN}
        found[name] = common | rest | {"own": {"row_length": 64} | own}
    return found


@pytest.fixture(scope="module")
def ends(path):
    made = {}

    def of(engine, name):
        ranks = min(torch.cuda.device_count(), 2) if engine != "none" else None
        names = next(names for names in LAUNCHES if name in names)
        if engine == "ddp":
            names = tuple(each for each in names if each not in OF_SHARDS)
        return launch_once(made, (engine, names), ranks, runs(path, engine, ranks or 1, names))[name]

    return of


@pytest.mark.parametrize(
    ("engine", "name"),
    [(engine, name) for engine in ("ddp", "fsdp2") for name in SETTINGS if engine == "fsdp2" or name not in OF_SHARDS],
)
def test_as_one_process(ends, engine, name):
    one, several = ends("none", name), ends(engine, name)
    assert one["compiled"] == several["compiled"] == (name != "exact")
    metrics, weights = differences(one, several, ("rewards/accuracies",))
    most_metrics, most_weights = CLOSE.get(name, (2e-4, 1e-5))
    assert metrics <= most_metrics
    assert weights <= most_weights
