"""Compiled layers: the numbers of the layers as they are, one compilation for all layers and lengths, only for rows."""

import copy

import pytest
import torch
from families import VOCABULARY, build, exact_model
from oracle import random_sequences
from torch._dynamo.utils import counters

import preftree
from preftree.models import compiled
from preftree.models.compiled import compile_layers


@pytest.fixture
def captured(monkeypatch):
    """Graphs run as they were captured: what is compiled when does not depend on the compiler behind."""
    monkeypatch.setitem(compiled._OPTIONS, "backend", "aot_eager")


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled yet."""
    torch._dynamo.reset()
    counters.clear()
    compiled._compiled_class.cache_clear()
    yield
    compiled._compiled_class.cache_clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def row_of(seed, spare=0):
    trees = [
        preftree.TokenTree.from_sequences(*group)
        for group in random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
    ]
    return preftree.pack(trees, sum(len(tree) for tree in trees) + spare)[0]


ROWS = [row_of(1), row_of(2, 3), row_of(3, 7), row_of(4)]


def numbers(model, row):
    """Log-probabilities and every gradient of an uneven sum of them."""
    model.zero_grad()
    out = preftree.sequence_logps(model, row)
    (out.logps * torch.arange(1, len(out.logps) + 1)).sum().backward()
    return [out.logps.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def close(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_same_numbers_by_compiled_code():
    model = preftree.prepare_model(exact_model("qwen3")).train()
    expected = [numbers(model, row) for row in ROWS]
    compile_layers(model)
    for row, own in zip(ROWS, expected, strict=True):
        close(numbers(model, row), own)
    assert graphs() > 0


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2", "deepseek_v3", "gpt_oss", "olmo2"])
def test_one_compilation_for_all_lengths(name):
    """Gemma 3 has two kinds of layers, the mixtures of experts parts that cannot be compiled."""
    model = preftree.prepare_model(exact_model(name)).train()
    expected = [numbers(model, row) for row in ROWS]
    assert compile_layers(model) == 3
    assert compile_layers(model) == 3
    close(numbers(model, ROWS[0]), expected[0])
    compilations = graphs()
    assert compilations > 0
    assert len({len(row) for row in ROWS}) == len(ROWS)
    for row, own in zip(ROWS[1:], expected[1:], strict=True):
        close(numbers(model, row), own)
    assert graphs() == compilations


@pytest.mark.usefixtures("captured")
def test_more_layers_take_no_more_compilations():
    counts = []
    for layers in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        model = preftree.prepare_model(build("Llama", {"num_hidden_layers": layers}), compile=True)
        numbers(model, ROWS[0])
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_around_the_compiled_code(reentrant, monkeypatch):
    """Each compiled part runs a second time for the backward pass, and nothing runs uncompiled instead."""
    ran = []

    def counting(graph, inputs):
        return lambda *values: (ran.append(graph), graph(*values))[1]

    monkeypatch.setitem(compiled._OPTIONS, "backend", counting)
    model = preftree.prepare_model(exact_model("llama")).train()
    expected = numbers(model, ROWS[0])
    compile_layers(model)
    close(numbers(model, ROWS[0]), expected)
    once = len(ran)
    assert once > 0
    ran.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    close(numbers(model, ROWS[0]), expected)
    # With reentrant checkpointing the last layer is computed whole; else its keys are made outside, once.
    assert once == 4
    assert len(ran) == 2 * 3 + (not reentrant)


def test_ordinary_batches_and_generation_are_not_compiled():
    model = exact_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    preftree.prepare_model(model, compile=True)
    torch.testing.assert_close(model(ids).logits, expected[0])
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected[1])
    assert graphs() == 0


@pytest.mark.usefixtures("captured")
def test_classes_keep_their_names_and_copies_run_their_own_weights():
    model = preftree.prepare_model(exact_model("llama"), compile=True)
    layer = model.model.layers[0]
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert isinstance(layer, type(exact_model("llama").model.layers[0]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    halved = preftree.prepare_model(exact_model("llama"))
    halved.load_state_dict(other.state_dict())
    close(numbers(other, ROWS[1]), numbers(halved, ROWS[1]))
