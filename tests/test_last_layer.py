"""The last layer at scored tokens alone: the numbers and gradients of the whole layer, for fewer tokens."""

import pytest
import torch
from families import EXACT, VOCABULARY, exact_model
from oracle import random_sequences

import preftree
from preftree.models import last_layer, prepared_part

CUT = [name for name in EXACT if not name.startswith("gpt2")]


def row_of(seed=0, spare=3):
    groups = random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    return preftree.pack(trees, sum(len(tree) for tree in trees) + spare)[0]


def layers_of(model):
    count = model.config.get_text_config().num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    return lists[0]


def numbers(model, row, **options):
    """Log-probabilities, every gradient, and how many tokens each of the last two layers was computed at."""
    model.zero_grad()
    lengths = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output: lengths.append((output[0] if isinstance(output, tuple) else output).shape[-2])
        )
        for layer in layers_of(model)[-2:]
    ]
    out = preftree.sequence_logps(model, row, **options)
    for hook in hooks:
        hook.remove()
    (out.logps * torch.arange(1, len(out.logps) + 1)).sum().backward()
    return [out.logps.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]], lengths


def assert_close(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 + 1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", CUT)
def test_cut_layer_is_the_whole_layer(name):
    model, row = preftree.prepare_model(exact_model(name)), row_of()
    cut, lengths = numbers(model, row)
    assert lengths == [len(row), len(row.read_nodes)]
    prepared_part(model).last_layer_at_tokens = False
    whole, lengths = numbers(model, row)
    assert lengths == [len(row), len(row)]
    assert_close(cut, whole)


def test_a_layer_that_does_not_bear_it_is_run_whole():
    """GPT-2 shapes attention's output by the length it was called with."""
    model = preftree.prepare_model(exact_model("gpt2"))
    assert not prepared_part(model).last_layer_at_tokens
    assert not layers_of(model)[-1]._forward_pre_hooks
    assert numbers(model, row_of())[1] == [len(row_of())] * 2


def test_a_layer_that_gives_something_else_is_run_whole(monkeypatch):
    attend = last_layer._AtTokens.__call__
    monkeypatch.setattr(last_layer._AtTokens, "__call__", lambda *args: 1.1 * attend(*args))
    model = preftree.prepare_model(exact_model("qwen3"))
    assert not prepared_part(model).last_layer_at_tokens


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_with_activation_checkpointing(name, reentrant):
    """A reentrant checkpoint would lose the gradient of keys that reach it beside its arguments: the layer runs whole."""
    model, row = preftree.prepare_model(exact_model(name)), row_of(1)
    expected, _ = numbers(model, row)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model.enable_input_require_grads()
    got, lengths = numbers(model, row)
    assert lengths[1] == (len(row) if reentrant else len(row.read_nodes))
    assert_close(got, expected)


def test_experts_load_is_that_of_all_tokens():
    model, row = preftree.prepare_model(exact_model("mixtral")), row_of()
    out = preftree.sequence_logps(model, row, experts=True)
    layers = model.config.num_hidden_layers
    assert out.expert_counts.sum() == layers * model.config.num_experts_per_tok * row.node_counts.sum()


def test_nothing_scored_and_nothing_but_padding():
    model = preftree.prepare_model(exact_model("llama"))
    alone = preftree.pack([preftree.TokenTree.from_sequences([[5]], [0])], 4)[0]
    for row in (alone, preftree.packing.empty_row(6)):
        out = preftree.sequence_logps(model, row)
        assert not out.logps.any()
        out.logps.sum().backward()
    prepared_part(model).hidden_states(row_of(), torch.zeros(0, dtype=torch.long))


def test_copies_and_ordinary_batches_are_not_cut():
    model, row = preftree.prepare_model(exact_model("llama")), row_of()
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, exact_model("llama")(ids).logits)
    assert prepared_part(model).hidden_states(row).shape[0] == len(row)
    nodes = torch.tensor([4, 1, 7])
    torch.testing.assert_close(
        prepared_part(model).hidden_states(row, nodes), prepared_part(model).hidden_states(row)[nodes]
    )
