"""Trainers on a GPU: through FlexAttention, in static row lengths, the same training as TRL's; half precision; any loop."""

import math

import pytest
import torch
from conftest import word_tokenizer
from families import saved_model
from preference_data import dataset, examples, text_pairs
from test_ranked import assert_as_listed, ranked_examples
from test_trainers import METHODS, OVER_PADDING, RATES, settings_of
from transformers import AutoModelForCausalLM
from trl_runs import differences, train

import preftree
from preftree.trainers.row_length import MOST_TOKENS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Qwen3 whose heads are large enough for the kernel."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    return saved_model("qwen3", folder, word_tokenizer(), hidden_size=64, head_dim=16)


@pytest.mark.parametrize("own", [{}, {"row_length": 128}], ids=["one-row", "several-rows"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"loss_type": ["aot", "sft"]}, {"activation_offloading": True}],
    ids=str,
)
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


def test_row_length_auto(path):
    """All memory is free for so small a model: rows as long as they get, and the same training."""
    settings = {"use_cpu": False, "tf32": False, "learning_rate": 1e-3}
    data = dataset(text_pairs(30))
    plain, fitted = (train("preftree", path, data, own=own, **settings) for own in ({}, {"row_length": "auto"}))
    assert fitted._trees.row_length == MOST_TOKENS
    metrics, parameters = differences(plain, fitted)
    assert metrics <= 2e-4
    assert parameters <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_other_trainers(path, method):
    settings = settings_of(method, max_steps=3, use_cpu=False, tf32=False) | {"learning_rate": 1e-3}
    data = dataset(examples(method, text_pairs(18)))
    theirs, ours = (
        train(kind, path, data, own={"row_length": 128}, method=method, **settings) for kind in ("trl", "preftree")
    )
    metrics, parameters = differences(theirs, ours, OVER_PADDING.get(method, ()))
    assert metrics <= 2e-4
    assert parameters <= 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["DPO", *METHODS])
def test_half_precision(path, method, precision):
    """Within half precision's rounding of TRL's run in half precision, which is not that of full precision."""
    rates = RATES | {"DPO": 0.03}
    settings = {"learning_rate": rates[method] / 10, "per_device_train_batch_size": 6, "max_steps": 3, "use_cpu": False}
    settings |= {"bf16": precision == "bf16", "fp16": precision == "fp16", "gradient_checkpointing": True}
    data = dataset(examples(method, text_pairs(18)))
    theirs, ours = (
        train(kind, path, data, own={"row_length": 128}, method=method, **settings) for kind in ("trl", "preftree")
    )
    for left, right in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        if "loss" in left:
            assert right["loss"] == pytest.approx(left["loss"], rel=0.05, abs=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in ours.model.parameters())


def test_ranked_as_listed(path):
    assert_as_listed(path, ranked_examples(8), own={"row_length": 128}, use_cpu=False, tf32=False, tolerance=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_shared_prefixes_of_any_loop(path, side):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = AutoModelForCausalLM.from_pretrained(path).cuda()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(6, 30, (40,), generator=generator)
    rows = [torch.cat((prompt, torch.randint(6, 30, (size,), generator=generator))) for size in (5, 31, 17, 2)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side).cuda()
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
    ).cuda()

    def run():
        logits = model(input_ids=ids, attention_mask=mask).logits
        model.zero_grad()
        (logits * mask[..., None]).square().sum().backward()
        return logits.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    stock = run()
    with preftree.share_prefixes(model):
        shared = run()
    assert ((stock[0] - shared[0]) * mask[..., None]).abs().max() <= 1e-4 * stock[0].abs().max()
    assert (stock[1] - shared[1]).abs().max() <= 1e-3 * stock[1].abs().max()
