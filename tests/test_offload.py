"""Layers whose weights stay in the host's memory: the same numbers, and weights that are nobody else's between passes."""

import copy

import pytest
import torch
from families import build, exact_model
from test_dpo_trainer import dataset, text_pairs
from trl import unpair_preference_dataset
from trl_runs import construct, differences, train

import preftree
from preftree.models import compiled, prepared_part
from preftree.models.offload import offload_layers

CPU = torch.device("cpu")


def offloaded(model):
    offload_layers(prepared_part(model), CPU)
    return model


def row_of(*sequences, prompt=2):
    return preftree.pack([preftree.TokenTree.from_sequences(sequences, [prompt] * len(sequences))])[0]


ROWS = [row_of([1, 2, 3, 4], [1, 2, 5, 6, 7]), row_of([3, 4, 5], [3, 4, 1, 2, 1, 2]), row_of([9, 8, 7, 6])]


@torch.no_grad()
def logps(model, row):
    return preftree.sequence_logps(model, row).logps


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("nothing_compiled")
def test_same_numbers(name, compile, monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    model = preftree.prepare_model(exact_model(name), compile=compile)
    expected = [logps(model, row) for row in ROWS]
    weights = copy.deepcopy(model.state_dict())
    offloaded(model)
    for _ in range(2):
        for row, values in zip(ROWS, expected, strict=True):
            assert torch.equal(logps(model, row), values)
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    # Ordinary batches come by the same layers.
    twin = exact_model(name)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, twin(tokens).logits)


def test_two_layers_have_turns_on_the_device():
    model = offloaded(preftree.prepare_model(build("Llama", {"num_hidden_layers": 5})))
    used = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda layer, _: used.append([p.data_ptr() for p in layer.parameters()]))
    home = [[p.data_ptr() for p in layer.parameters()] for layer in model.model.layers]
    logps(model, ROWS[0])
    assert used[0] == used[2] == used[4]
    assert used[1] == used[3]
    everywhere = [*used[0], *used[1], *(pointer for layer in home for pointer in layer)]
    assert len(set(everywhere)) == len(everywhere)
    assert [[p.data_ptr() for p in layer.parameters()] for layer in model.model.layers] == home


def test_changed_weights_are_seen():
    model = offloaded(preftree.prepare_model(build("Llama", {"num_hidden_layers": 3})))
    logps(model, ROWS[0])
    # A pass that is cut short leaves the next layer's weights on the device.
    stop = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logps(model, ROWS[0])
    stop.remove()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    twin = preftree.prepare_model(build("Llama", {"num_hidden_layers": 3}))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logps(model, ROWS[0]), logps(twin, ROWS[0]))


def test_gradients_are_refused():
    model = offloaded(preftree.prepare_model(exact_model("llama")))
    with pytest.raises(RuntimeError, match="run without gradients only"):
        preftree.sequence_logps(model, ROWS[0])
    assert torch.isfinite(logps(model, ROWS[0])).all()


def test_what_cannot_be_offloaded_is_named(monkeypatch):
    shared = preftree.prepare_model(exact_model("llama"))
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM cannot be offloaded: its layers share weights"):
        offloaded(shared)
    quantised = preftree.prepare_model(exact_model("llama"))
    quantised.is_quantized = True
    with pytest.raises(NotImplementedError, match="its weights are quantised"):
        offloaded(quantised)
    elsewhere = preftree.prepare_model(exact_model("llama"))
    with pytest.raises(NotImplementedError, match="sharded, or not on meta"):
        offload_layers(prepared_part(elsewhere), torch.device("meta"))
    prepared = prepared_part(elsewhere)
    prepared.attention_layers = 77
    with pytest.raises(NotImplementedError, match="no list of its 77 layers"):
        offloaded(elsewhere)


def test_options_that_exclude_it(model_path):
    data = dataset(text_pairs(4))
    with pytest.raises(ValueError, match="offload_reference cannot be combined with sync_ref_model"):
        construct("preftree", model_path, data, {"offload_reference": True}, sync_ref_model=True)
    peft = pytest.importorskip("peft")
    adapter = {"peft_config": lambda: peft.LoraConfig(target_modules=["q_proj"])}
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        construct("preftree", model_path, data, {"offload_reference": True}, adapter)
    with pytest.warns(UserWarning, match="no reference runs in training"):
        construct("preftree", model_path, data, {"offload_reference": True}, precompute_ref_log_probs=True)


@pytest.mark.parametrize("method", ["DPO", "KTO"])
def test_trainers_offload_their_reference(model_path, method):
    data = dataset(text_pairs(15))
    data = unpair_preference_dataset(data) if method == "KTO" else data
    plain, trainer = (
        train("preftree", model_path, data, own, method=method) for own in ({}, {"offload_reference": True})
    )
    layer = trainer.ref_model.model.layers[0]
    assert len({parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}) == 1
    assert differences(plain, trainer) == (0, 0)
