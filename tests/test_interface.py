"""Rules read off transformers' mask functions: known where they are its own, asked pair by pair where they are not."""

import pytest
import torch
from families import VOCABULARY, exact_model
from oracle import random_row
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import preftree
from preftree.attention import TreeAttention
from preftree.models import interface
from preftree.models.interface import _rule

NO_PADDING = torch.zeros(1, dtype=torch.long)


def user_mask(sliding_window=5, chunk_size=7):
    def inner_mask(batch, head, query, key):
        return (key <= query) & (key > query - sliding_window) & (key // chunk_size == query // chunk_size)

    return inner_mask


def agrees(rule, visible):
    """Whether the rule's own function and, if it is known, its lowest positions are ``visible(query, key)``."""
    positions = torch.arange(50)
    expected = torch.tensor([[k <= q and visible(q, k) for k in range(50)] for q in range(50)])
    same = torch.equal(rule(positions, positions), expected)
    if rule.known:
        lowest = rule.lowest(positions)[:, None]
        same &= torch.equal((positions <= positions[:, None]) & (positions >= lowest), expected)
    return same


def test_causal():
    rule = _rule(causal_mask_function, None)
    assert (rule.causal, rule.window, rule.chunk) == (True, None, None)
    assert agrees(rule, lambda q, k: True)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_sliding_windows(window):
    rule = _rule(sliding_window_causal_mask_function(window), window)
    assert (rule.causal, rule.window, rule.chunk, rule.reach) == (False, window, None, window)
    assert agrees(rule, lambda q, k: q - k < window)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks(chunk):
    rule = _rule(chunked_causal_mask_function(chunk, NO_PADDING), chunk)
    assert (rule.causal, rule.window, rule.chunk, rule.reach) == (False, None, chunk, chunk)
    assert agrees(rule, lambda q, k: q // chunk == k // chunk)


@pytest.mark.parametrize("local_size", [None, 5])
@pytest.mark.parametrize(
    ("function", "visible"),
    [
        (
            and_masks(sliding_window_overlay(5), causal_mask_function, chunked_overlay(7, NO_PADDING)),
            lambda q, k: q - k < 5 and q // 7 == k // 7,
        ),
        (and_masks(sliding_window_causal_mask_function(5), user_mask()), lambda q, k: q - k < 5 and q // 7 == k // 7),
        (and_masks(sliding_window_overlay(9), user_mask()), lambda q, k: q - k < 5 and q // 7 == k // 7),
        (and_masks(user_mask(), causal_mask_function), lambda q, k: q - k < 5 and q // 7 == k // 7),
        (
            and_masks(or_masks(sliding_window_overlay(5), chunked_overlay(7, NO_PADDING)), causal_mask_function),
            lambda q, k: q - k < 5 or q // 7 == k // 7,
        ),
        (or_masks(sliding_window_causal_mask_function(5), causal_mask_function), lambda q, k: True),
        (user_mask(), lambda q, k: q - k < 5 and q // 7 == k // 7),
        (and_masks(causal_mask_function), lambda q, k: True),
        (lambda batch, head, query, key: key <= query, lambda q, k: True),
    ],
    ids=["three", "nested", "own-causality", "own-overlay", "or-inside", "or", "closure", "one", "lambda"],
)
def test_everything_else_is_asked_pair_by_pair(function, visible, local_size):
    rule = _rule(function, local_size)
    assert not rule.known
    assert (rule.reach, rule.function) == (local_size, function)
    assert agrees(rule, visible)


def test_an_or_of_two_whose_second_is_causal_is_no_window():
    """The same parts as a sliding window's, joined otherwise."""
    rule = _rule(or_masks(sliding_window_overlay(5), causal_mask_function), None)
    assert not rule.known


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"causal"}),
        ("mistral-window", {("window", 5)}),
        ("gemma3", {"causal", ("window", 5)}),
        ("llama4-chunks", {"causal", ("chunk", 8)}),
    ],
)
def test_families_hand_over_their_rules(name, expected, monkeypatch):
    model = preftree.prepare_model(exact_model(name), verify=False)
    rules = []

    class Watched(TreeAttention):
        def __init__(self, row, rule, backend="auto"):
            rules.append(rule)
            super().__init__(row, rule, backend)

    monkeypatch.setattr(interface, "TreeAttention", Watched)
    row = random_row(1)
    assert int(row.input_ids.max()) < VOCABULARY
    preftree.sequence_logps(model, row)
    told = {"causal" if r.causal else ("window", r.window) if r.window else ("chunk", r.chunk) for r in rules}
    assert told == expected
