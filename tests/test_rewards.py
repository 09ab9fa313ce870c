"""Rewards from rows of trees against the stock sequence classifier on each sequence alone, gradients too."""

import copy

import pytest
import torch
from families import EXACT, build
from oracle import random_sequences

import preftree
from preftree.packing import empty_row

FAMILIES = ["llama", "mistral-window", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral", "phi3"]


def classifier(name: str, **changes):
    family, settings = EXACT[name]
    return build(family, {"num_labels": 1} | settings | changes, head="SequenceClassification")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_gradients(name, checkpointing):
    model = classifier(name)
    stock = copy.deepcopy(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    groups = random_sequences(torch.Generator().manual_seed(3), 131)
    # Ends in padding tokens (id 0), which the classifier does not read; one sequence is nothing but padding.
    groups.append(([[5, 6, 7, 0, 0], [5, 6, 8, 0], [5, 0, 0], [0, 0]], [1, 1, 1, 1]))
    trees = [preftree.TokenTree.from_sequences(*group) for group in groups]
    sequences = [sequence for group in groups for sequence in group[0]]
    weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([stock(torch.tensor([ids]), use_cache=False).logits[0, 0] for ids in sequences])
    (expected * weights).sum().backward()
    got = torch.zeros_like(expected)
    for row in preftree.pack(trees, max(len(tree) for tree in trees) + 9, pad_token_id=0):
        rewards = preftree.sequence_rewards(model, row)
        (rewards * weights[row.sequence_ids]).sum().backward()
        got[row.sequence_ids] = rewards.detach()
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    largest = max(float(p.grad.abs().max()) for p in stock.parameters() if p.grad is not None)
    for (parameter_name, mine), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if theirs.grad is not None:
            scale = max(float(theirs.grad.abs().max()), 1e-3 * largest)
            assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * scale, parameter_name


def test_without_a_padding_token_the_last_token_is_read():
    model = classifier("llama", pad_token_id=None)
    stock = copy.deepcopy(model)
    sequences = [[5, 6, 7, 0], [5, 6, 0]]
    [row] = preftree.pack([preftree.TokenTree.from_sequences(sequences, [1, 1])])
    expected = torch.stack([stock(torch.tensor([ids])).logits[0, 0] for ids in sequences])
    torch.testing.assert_close(preftree.sequence_rewards(model, row), expected)


def test_an_empty_row_keeps_every_parameter_in_the_graph():
    model = classifier("llama")
    rewards = preftree.sequence_rewards(model, empty_row(16))
    assert rewards.shape == (0,)
    rewards.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_gives_no_rewards():
    [row] = preftree.pack([preftree.TokenTree.from_sequences([[5, 6]], [1])])
    with pytest.raises(ValueError, match="LlamaForSequenceClassification gives no rewards"):
        preftree.sequence_rewards(classifier("llama", num_labels=2), row)
    family, settings = EXACT["llama"]
    with pytest.raises(ValueError, match="LlamaForCausalLM gives no rewards: load the model with"):
        preftree.sequence_rewards(build(family, settings), row)
    with pytest.raises(ValueError, match="has no output head over the vocabulary"):
        preftree.sequence_logps(classifier("llama"), row)
