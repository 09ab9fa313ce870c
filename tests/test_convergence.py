"""Whole runs against TRL: 20 steps, random pairs and real ones (`make test-convergence`)."""

import gzip
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import word_tokenizer
from preference_data import dataset, examples, text_pairs
from test_trainers import METHODS, OVER_PADDING, settings_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl_runs import differences, end_of, train

from preftree import DPOConfig, DPOTrainer
from preftree.data import load_pairs

pytestmark = pytest.mark.convergence

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
STEPS, PAIRS = 20, 5
# AdamW divides by the gradient's size, which makes its rounding as large as the gradient where that is small.
TOLERANCE = {"sgd": 1e-5, "adamw_torch": 1e-4}
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data are not there")


def of_size(pairs, tokenizer, tmp_path, low, high):
    """As many pairs as the steps take whose trees have more than ``low`` and at most ``high`` tokens."""
    args = DPOConfig(str(tmp_path), max_length=None, bf16=False, use_cpu=True)
    tokenised = DPOTrainer.tokenize(dataset(pairs), tokenizer, args, len(tokenizer))
    sizes = [len(DPOTrainer.layout(args).group(example).tree()) for example in tokenised]
    fitting = [pair for pair, size in zip(pairs, sizes, strict=True) if low < size <= high]
    assert len(fitting) >= STEPS * PAIRS
    return dataset(fitting[: STEPS * PAIRS])


def compare(theirs, model, data, row_length, rows, noise=0.0, **settings):
    ours = train("preftree", model, data, own={"row_length": row_length}, **settings)
    assert ours.computed["rows"] == rows * STEPS
    metrics, parameters = differences(theirs, ours)
    print(f"metrics {metrics:.1e} (TRL against itself {noise:.1e}), parameters {parameters:.1e}")
    assert metrics <= max(TOLERANCE[settings["optim"]], 2 * noise)
    assert parameters <= TOLERANCE[settings["optim"]]


# Trees of more than 0.6 and at most 1 `size`: a row of one size holds one of them, a row of three holds three of the five.
ROWS = [pytest.param(None, 1, id="one-row"), pytest.param(3, 2, id="two-rows"), pytest.param(1, 5, id="five-rows")]


@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize(("trees", "rows"), ROWS)
def test_random_pairs(model_path, tmp_path, optimizer, trees, rows):
    settings = {"max_steps": STEPS, "optim": optimizer, "learning_rate": 0.02 if optimizer == "sgd" else 1e-3}
    data = of_size(text_pairs(400), word_tokenizer(), tmp_path, 31, 52)
    theirs = train("trl", model_path, data, **settings)
    compare(theirs, model_path, data, trees and trees * 52, rows, **settings)


@cache
def smollm2():
    pytest.importorskip("gguf")
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import smollm2

    return str(smollm2(ROOT / "build" / "smollm2"))


@cache
def by_trl(data_of, tmp_path, **settings):
    return end_of(train("trl", smollm2(), data_of(tmp_path), **settings))


@cache
def harmless(tmp_path):
    with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rt") as lines:
        pairs = [json.loads(line) for line in lines]
    # Kept short enough for two cores: dialogues of some fifty tokens.
    short = [pair for pair in pairs if len(pair["chosen"]) + len(pair["rejected"]) < 1000]
    return of_size(short, AutoTokenizer.from_pretrained(smollm2()), tmp_path, 43, 72)


def ultrafeedback_like(tmp_path):
    return load_pairs(SHARED / "dpo_en_demo.json.gz").select(range(2 * STEPS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convergence")


@REAL
@pytest.mark.parametrize("optimizer", TOLERANCE)
@pytest.mark.parametrize(("trees", "rows"), ROWS)
def test_real_dialogues_on_smollm2(folder, optimizer, trees, rows):
    settings = {
        "max_steps": STEPS,
        "optim": optimizer,
        "learning_rate": 1e-3 if optimizer == "sgd" else 1e-6,
        "beta": 0.1,
    }
    theirs = by_trl(harmless, folder, **settings)
    compare(theirs, smollm2(), harmless(folder), trees and trees * 72, rows, **settings)
    losses = torch.tensor([entry["loss"] for entry in theirs["history"] if "loss" in entry])
    assert losses.std() > 1e-3  # the weights moved


@REAL
def test_real_chats_on_smollm2(folder):
    """ShareGPT chats, cut at 200 tokens as TRL cuts them.

    Log-probabilities of -300 round by more than 1e-5, TRL's own too: it is compared with itself when it pads more.
    """
    settings = {"max_steps": STEPS, "optim": "sgd", "learning_rate": 1e-3, "beta": 0.1, "max_length": 200}
    settings["per_device_train_batch_size"] = 1
    theirs = by_trl(ultrafeedback_like, folder, **settings)
    noise, _ = differences(theirs, by_trl(ultrafeedback_like, folder, pad_to_multiple_of=64, **settings))
    compare(theirs, smollm2(), ultrafeedback_like(folder), 400, 1, noise, **settings)


@pytest.fixture(scope="module")
def small_path(folder):
    """A tiny Llama with SmolLM2's tokenizer, which merges across the border of prompt and response."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return str(folder / "small")


def dialogues(count):
    """Dialogues of two hundred tokens, their last answer split off."""
    with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = []
    for row in rows:
        prompt = row["chosen"][: row["chosen"].rfind("Assistant:") + len("Assistant:")]
        chosen, rejected = (row[side].removeprefix(prompt) for side in ("chosen", "rejected"))
        if len(prompt) < 600 and chosen.strip() and rejected.strip() and rejected != row["rejected"]:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs[:count]


@REAL
@pytest.mark.parametrize("method", METHODS)
def test_real_dialogues_for_other_trainers(small_path, method):
    """Ten steps. Sums of 200 log-probabilities round by more than 1e-5: TRL is compared with itself when it pads more."""
    settings = settings_of(method, per_device_train_batch_size=4, learning_rate=1e-3)
    data = dataset(examples(method, dialogues(40)))
    theirs = train("trl", small_path, data, method=method, **settings)
    ours = train("preftree", small_path, data, own={"row_length": 600}, method=method, **settings)
    assert ours.computed["rows"] > 10
    noise = 0.0
    if method in ("TPO", "KTO"):
        noise, _ = differences(theirs, train("trl", small_path, data, method=method, pad_to_multiple_of=64, **settings))
    metrics, parameters = differences(theirs, ours, OVER_PADDING.get(method, ()))
    print(f"metrics {metrics:.1e} (TRL against itself {noise:.1e}), parameters {parameters:.1e}")
    assert metrics <= max(1e-5, 2 * noise)
    assert parameters <= 1e-5
