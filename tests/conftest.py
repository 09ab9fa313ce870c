"""Shared fixtures: a tiny tokenizer made here, tiny models, and no network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from preftree.models import compiled

# The models are tiny: a process of the test run for each core is faster than a thread for each core.
torch.set_num_threads(1)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "tree",
    "river",
    "stone",
    "runs",
    "sleeps",
    "sings",
    "near",
    "under",
    "over",
    "red",
    "blue",
    "old",
    "new",
    "and",
    "but",
    ".",
    ",",
    "?",
    "!",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with a chat template."""
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="module", autouse=True)
def _imports_kept():
    """What has been imported is left out of collections: accelerate asks for one whenever a run begins."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_compiled():
    """No layer is compiled yet, and none stays so."""
    torch._dynamo.reset()
    counters.clear()
    compiled._compiled_class.cache_clear()
    yield
    compiled._compiled_class.cache_clear()


@pytest.fixture
def group_of_one():
    """This process is the only rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tokenizer):
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"), tokenizer)


def make_tiny_model(path, tokenizer) -> str:
    """A tiny Llama with random weights, saved with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="sdpa",
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    """Reference log-probabilities cached by one trainer must not feed another one's test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
