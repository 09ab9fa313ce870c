"""Families that nobody has tried: a tiny twin of the model is, the first time."""

import json
import sys
import types

import pytest
import torch
import transformers
from families import exact_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

import preftree
from preftree.families import census, selftest
from preftree.models import prepare, twins


class InventedConfig(LlamaConfig):
    model_type = "invented"
    sliding_window: int | None = 200


class ByIndex(torch.nn.Embedding):
    """Louder from some index of the row on."""

    first = 0

    def forward(self, ids):
        index = torch.arange(ids.shape[-1], device=ids.device)
        return super().forward(ids) * torch.where(index < self.first, 1.0, 1.5)[:, None]


class InventedForCausalLM(LlamaForCausalLM):
    """Exact: its window is a setting without a meaning."""

    config_class = InventedConfig


class WrongForCausalLM(InventedForCausalLM):
    """What its embeddings do beyond its window does not show in thirty tokens."""

    factor = 1

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens = ByIndex(config.vocab_size, config.hidden_size)
        self.model.embed_tokens.first = self.factor * config.sliding_window


class LaterForCausalLM(WrongForCausalLM):
    """Nor does it in its twin's thirty tokens, but in the longer texts that the twin is compared on."""

    factor = 8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "preftree" / "families"


@pytest.fixture
def tried(monkeypatch):
    """What was tried."""
    calls, run = [], selftest._try
    monkeypatch.setattr(selftest, "_try", lambda stock: calls.append(type(stock).__name__) or run(stock))
    return calls


def model_of(kind, **settings):
    config = InventedConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=12,
        **settings,
    )
    torch.manual_seed(0)
    return kind(config).eval()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (WrongForCausalLM, "refused: hidden states of a small tree differ"),
        (LaterForCausalLM, "log-probabilities differ by"),
    ],
)
def test_what_is_wrong_by_the_thousandth_token_is_refused(kind, says, cache, tried, monkeypatch):
    for _ in range(2):
        model = model_of(kind)
        before = model.config._attn_implementation
        with pytest.raises(NotImplementedError, match=rf"{kind.__name__} .*'invented'.* a tiny random model .*{says}"):
            preftree.prepare_model(model)
        assert (model.config._attn_implementation, "forward" in vars(model)) == (before, False)
    assert tried == [kind.__name__]
    assert len(list(cache.iterdir())) == 1
    # The trial of thirty tokens alone does not see it.
    monkeypatch.setattr(selftest, "what_is_wrong", lambda model: None)
    preftree.prepare_model(model_of(kind))


def test_exact_families_are_tried_once(cache, tried):
    for _ in range(2):
        preftree.prepare_model(model_of(InventedForCausalLM))
    assert tried == ["InventedForCausalLM"]
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text()) == {"family": "invented", "wrong": None}
    # Other sizes have the same twin, other settings another one.
    preftree.prepare_model(model_of(InventedForCausalLM, max_position_embeddings=4096))
    assert len(tried) == 1
    preftree.prepare_model(model_of(InventedForCausalLM, hidden_act="gelu"))
    assert len(tried) == 2
    for torn in ("", "[]", '{"family'):
        kept.write_text(torn)
        preftree.prepare_model(model_of(InventedForCausalLM))
    assert len(tried) == 5
    assert json.loads(kept.read_text())["wrong"] is None


def test_without_a_folder_to_keep_it_in(cache, tried, monkeypatch):
    cache.parent.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "file"))
    for _ in range(2):
        preftree.prepare_model(model_of(InventedForCausalLM))
    assert len(tried) == 2


def test_known_families_are_not_tried(cache, tried, monkeypatch):
    preftree.prepare_model(exact_model("llama"))
    assert not tried
    # In a later release of transformers they are.
    selftest._known.cache_clear()
    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    preftree.prepare_model(exact_model("mistral-window"))
    selftest._known.cache_clear()
    assert tried == ["MistralForCausalLM"]


def test_the_list_of_known_families_is_of_this_release():
    known = json.loads((selftest.files("preftree.families") / "exact.json").read_text())
    assert {"llama", "qwen3", "mamba", "gemma3_text", "gpt_oss"} <= set(known["exact"])
    assert "xlm" not in known["exact"]


def test_twins_have_all_settings_but_sizes():
    model = model_of(
        InventedForCausalLM,
        tie_word_embeddings=True,
        hidden_act="gelu",
        attention_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    )
    state = torch.random.get_rng_state()
    config = twins.twin_of(model).config
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(config) is InventedConfig
    assert (config.tie_word_embeddings, config.hidden_act, config.attention_bias) == (True, "gelu", True)
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 3.0)
    assert (config.vocab_size, config.num_hidden_layers, config.hidden_size, config.sliding_window) == (131, 4, 32, 5)
    assert model.config.num_hidden_layers == 5


def test_with_a_library_for_gpus_installed(cache, tried, monkeypatch):
    """Twins are on the CPU, where transformers would call the library nevertheless: its own code runs."""
    from transformers.models.lfm2 import modeling_lfm2

    def of_the_library(x, weight, bias=None, activation=None):
        raise RuntimeError("Expected x.is_cuda() to be true, but got false")

    library = types.ModuleType("library_for_gpus")
    library.causal_conv1d_fn = of_the_library
    monkeypatch.setitem(sys.modules, library.__name__, library)
    wrapper = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", library.__name__)
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", wrapper(modeling_lfm2.causal_conv1d_fn.__wrapped__))
    compared, differences = [], selftest.census.differences
    monkeypatch.setattr(
        selftest.census, "differences", lambda *models: compared.append(differences(*models)) or compared[-1]
    )
    model = exact_model("lfm2")
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert {place[1] for place in prepare._places_that_mix(model)} == {"conv", "self_attn"}
    monkeypatch.setattr(selftest, "_known", frozenset)
    assert selftest.what_is_wrong(model) is None
    assert (len(tried), len(compared)) == (1, 1)
    assert census.examine("lfm2", "Lfm2ForCausalLM").status == "exact"
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
