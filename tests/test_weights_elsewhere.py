"""Models prepared before their weights are there (ZeRO-3 has shared them out, another rank loads them): as tiny twins show."""

import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import VOCABULARY, build, exact_model
from oracle import random_sequences

import preftree
from preftree.models import compiled, prepare
from preftree.models.prepared import prepared_part
from preftree.models.twins import NotTiny
from preftree.trainers.reference import hash_gathered

pytestmark = pytest.mark.filterwarnings("ignore:.* run along each path")

# Attention alone, experts, positions of their own and counted from elsewhere; parts along paths in some layers, in all, and by
# index.
FAMILIES = [
    "llama",
    "mixtral",
    "gemma3",
    "gpt2",
    "opt",
    "roberta",
    "qwen3_5",
    "lfm2",
    "mamba",
    "falcon-alibi",
    "nemotron_h",
]


def without_weights(model):
    return copy.deepcopy(model).to("meta")


def given_weights(model, stock):
    """The model with another one's weights, as a rank gets them."""
    model.to_empty(device="cpu")
    model.load_state_dict(stock.state_dict())
    for name, buffer in stock.named_buffers():  # those that are not saved, too
        model.get_buffer(name).copy_(buffer)
    model.tie_weights()
    return model


def names_of(model, parts):
    names = {part: name for name, part in model.named_modules()}
    return [names[part] for part in parts]


def findings(model):
    prepared = prepared_part(model)
    return {
        "backbone": prepared.backbone_name,
        "along paths": names_of(model, prepared.along_paths),
        "first position": prepared.first_position,
        "last layer": prepared.last_layer_at_tokens,
    }


def numbers(model, row):
    model.zero_grad()
    logps = preftree.sequence_logps(model, row).logps
    (logps * torch.arange(1, len(logps) + 1)).sum().backward()
    return {"logps": logps.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_as_with_weights(name):
    stock = exact_model(name)
    whole = preftree.prepare_model(copy.deepcopy(stock))
    late = preftree.prepare_model(without_weights(stock))
    assert findings(late) == findings(whole)
    late = given_weights(late, stock)
    trees = [
        # (RoBERTa counts no position for its padding token.)
        preftree.TokenTree.from_sequences([[token or 1 for token in sequence] for sequence in sequences], lengths)
        for sequences, lengths in random_sequences(torch.Generator().manual_seed(5), VOCABULARY)
    ]
    (row,) = preftree.pack(trees, sum(map(len, trees)) + 3)
    expected, got = numbers(whole, row), numbers(late, row)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()), msg=key)


def test_what_the_twin_is_refused_for(monkeypatch):
    """By the family's name, once; and the model is left as it was."""
    monkeypatch.setattr(prepare, "verify_on_tree", lambda prepared: (_ for _ in ()).throw(NotImplementedError("wrong")))
    monkeypatch.setattr(prepare, "_find_mixers", lambda *args: [])
    model = without_weights(exact_model("llama"))
    with pytest.raises(NotImplementedError, match=r"^LlamaForCausalLM .*cannot share prefixes exactly: wrong$"):
        preftree.prepare_model(model)
    assert prepared_part(model) is None
    assert model.config._attn_implementation not in ("preftree", "preftree_eager")


def test_without_a_twin(monkeypatch):
    def none(model):
        raise NotTiny("its class wants a file")

    monkeypatch.setattr(prepare, "twin_of", none)
    with pytest.raises(NotImplementedError, match=r"ZeRO-3, or FSDP.s.*its class wants a file"):
        preftree.prepare_model(without_weights(exact_model("llama")))


def test_positions_by_a_padding_token_that_a_twin_has_not():
    """RoBERTa counts from behind it: a twin with another one counts otherwise."""
    model = without_weights(exact_model("roberta"))
    model.config.pad_token_id = model.config.pad_token_id + 1
    with pytest.raises(NotImplementedError, match="counts positions from behind its padding token's"):
        preftree.prepare_model(model)


@pytest.mark.parametrize("by", ["DeepSpeed ZeRO-3", "tensor parallelism"])
def test_weights_that_are_put_together_as_layers_run(monkeypatch, by):
    """These are not compiled: asked to, it is an error."""
    model = exact_model("llama")
    if by == "DeepSpeed ZeRO-3":
        monkeypatch.setattr(compiled, "is_deepspeed_zero3_enabled", lambda: True)
    else:
        model._tp_size = 2
    with pytest.raises(NotImplementedError, match=f"compiled layers with {by}"):
        preftree.prepare_model(model, compile=True)
    monkeypatch.setattr(compiled, "has_triton", lambda: True)
    assert not compiled.worth_compiling(model, torch.device("cuda"))


def test_gathered_weights_are_hashed(monkeypatch):
    """Each number, name and type counts."""
    gathered = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=lambda parameters: nullcontext()))
    monkeypatch.setitem(sys.modules, "deepspeed", gathered)
    model = build("Llama", {})
    hashes = [hash_gathered(model), hash_gathered(copy.deepcopy(model))]
    assert hashes[0] == hashes[1]
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    hashes.append(hash_gathered(model))
    hashes.append(hash_gathered(model.to(torch.bfloat16)))
    for value in (torch.tensor(2.0), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6, 2).half()):
        module = torch.nn.Module()
        module.scale = torch.nn.Parameter(value)
        hashes.append(hash_gathered(module))
    assert len(set(hashes)) == len(hashes) - 1
