"""Every family against its stock model on each sequence alone; what cannot be exact is refused by name."""

import pytest
import torch
from families import EXACT, REFUSED, VOCABULARY, exact_model, refused_model
from oracle import compare_with_stock, random_sequences

import preftree

TOLERANCE = 1e-5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", EXACT)
def test_family_is_exact(name, seed):
    groups = random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
    logps, gradients = compare_with_stock(exact_model(name), groups)
    assert logps <= TOLERANCE
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= TOLERANCE, worst


@pytest.mark.parametrize("backend", ["dense", "varlen"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt_oss", "deepseek_v3"])
def test_backends_agree_with_stock(name, implementation, backend):
    if name in ("gemma2", "gpt_oss") and implementation == "sdpa":
        pytest.skip("the stock family does not offer sdpa")
    groups = random_sequences(torch.Generator().manual_seed(5), VOCABULARY)
    model = exact_model(name, attn_implementation=implementation)
    logps, gradients = compare_with_stock(model, groups, backend=backend)
    assert logps <= TOLERANCE
    assert max(gradients.values()) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.* run along each path")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "qwen3_next", "falcon_h1", "deepseek_v32", "bloom"])
def test_several_rows_add_up(name):
    groups = random_sequences(torch.Generator().manual_seed(2), VOCABULARY, trees=6)
    longest = max(len(preftree.TokenTree.from_sequences(*group)) for group in groups)
    logps, gradients = compare_with_stock(exact_model(name), groups, row_length=longest + 3)
    assert logps <= TOLERANCE
    assert max(gradients.values()) <= TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss", "deepseek_v3"])
def test_activation_checkpointing_is_exact(name, reentrant):
    groups = random_sequences(torch.Generator().manual_seed(3), VOCABULARY)
    model = exact_model(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    logps, gradients = compare_with_stock(model, groups)
    assert logps <= TOLERANCE
    assert max(gradients.values()) <= TOLERANCE


def test_padding_within_a_sequence_where_it_counts_no_position():
    model = preftree.prepare_model(exact_model("roberta"))
    for token, wrong in ((4, False), (model.config.pad_token_id, True)):
        row = preftree.pack([preftree.TokenTree.from_sequences([[5, token, 6, 7], [5, token, 8]], [2, 2])], 9)[0]
        if wrong:
            with pytest.raises(ValueError, match="a sequence holds the padding token 0"):
                preftree.sequence_logps(model, row)
        else:
            preftree.sequence_logps(model, row)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    make, expected = refused_model(name)
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=expected) as error:
        preftree.prepare_model(model)
    assert type(model).__name__ in str(error.value)
    # The refused model is left as it was.
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model)


def test_layers_on_several_devices_are_refused():
    model = exact_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 0}
    with pytest.raises(NotImplementedError, match=r"device_map \(over 0, 1\): a row lies on one device"):
        preftree.prepare_model(model)
    model.hf_device_map = {"": 0}
    preftree.prepare_model(model)


def test_encoder_is_refused_in_coarse_precision_too():
    """What follows a token must not change it at all: rounding is no excuse."""
    model = refused_model("bert-encoder")[0]().to(torch.bfloat16)
    with pytest.raises(NotImplementedError, match="not causal"):
        preftree.prepare_model(model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3", "deepseek_v3", "gpt2"])
def test_coarse_precision_is_accepted(name):
    preftree.prepare_model(exact_model(name).to(torch.bfloat16))


def test_soft_cap_that_sdpa_would_drop_is_refused():
    """Some versions of transformers run Gemma 2 through SDPA without its soft cap, others raise."""
    model = exact_model("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(NotImplementedError, match="attn_logit_softcapping"):
        preftree.prepare_model(model)


def test_verification_alone_catches_what_no_setting_names(monkeypatch):
    """Without the list of settings, the run on a small tree still finds arithmetic by row index."""
    monkeypatch.setattr("preftree.models.prepare.read_by_index", lambda model: None)
    # (Its scales grow within the few tokens that verification runs.)
    with pytest.warns(UserWarning, match="place in the row"):
        model = preftree.prepare_model(exact_model("llama4-temperature"))
    assert len(model._preftree.along_paths) == 3
