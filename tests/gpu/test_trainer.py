"""`DPOTrainer` on a GPU: through FlexAttention, in static row lengths, the same training as TRL's."""

import math

import pytest
import torch
from conftest import word_tokenizer
from families import EXACT, build
from preference_data import dataset, text_pairs
from trl_runs import differences, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Qwen3 whose heads are large enough for the kernel."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-qwen3"), word_tokenizer()
    family, settings = EXACT["qwen3"]
    settings = settings | {"vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 16, "eos_token_id": 1}
    build(family, settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("own", [{}, {"row_length": 128}], ids=["one-row", "several-rows"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"loss_type": ["aot", "sft"]}], ids=str)
def test_same_training_as_trl(path, settings, own):
    """Float32; products on the GPU round differently in rows than in batches, hence the wider tolerance."""
    settings = {"use_cpu": False, "tf32": False, "learning_rate": 1e-3, "per_device_train_batch_size": 10} | settings
    data = dataset(text_pairs(30))
    theirs, ours = (train(kind, path, data, own=own, **settings) for kind in ("trl", "preftree"))
    assert ours.model.device.type == "cuda"
    metrics, parameters = differences(theirs, ours)
    assert metrics <= 2e-4
    assert parameters <= 1e-5
    assert (ours.computed["rows"] > 3) == bool(own)


def test_bf16_starts_at_ln_2(path):
    ours = train("preftree", path, dataset(text_pairs(30)), use_cpu=False, bf16=True, max_steps=1)
    assert ours.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert ours.computed["row_tokens"] % 128 == 0  # a static length, for a kernel compiled once
