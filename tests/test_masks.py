"""Rules and blocks of the mask: the specification against walks up the tree, blocks against all S x S entries of it."""

from functools import cache

import pytest
import torch
from oracle import random_row, seen_by_walking_up, shallow_row

import preftree
from preftree.attention import mask as mask_module
from preftree.attention.blocks import block_lists, two_runs
from preftree.attention.mask import CAUSAL, Rule, chunks, sliding_window, visible_blocks, visible_nodes
from preftree.packing import empty_row

# name: (the rule, the same in plain Python)
KNOWN = {
    "causal": (CAUSAL, lambda q, k: True),
    "window-1": (sliding_window(1), lambda q, k: q - k < 1),
    "window-2": (sliding_window(2), lambda q, k: q - k < 2),
    "window-5": (sliding_window(5), lambda q, k: q - k < 5),
    "window-40": (sliding_window(40), lambda q, k: q - k < 40),
    "chunk-1": (chunks(1), lambda q, k: k == q),
    "chunk-7": (chunks(7), lambda q, k: k // 7 == q // 7),
}


def _odd(batch, head, query, key):
    return (key == query) | ((key < query) & (key > query - 9) & (key % 3 != query % 2))


# Known by its function alone, as masks of a family's own are.
OTHER = {"reach": Rule(_odd, reach=9), "no-reach": Rule(_odd)}


def long_path(length=1000):
    return preftree.pack([preftree.TokenTree.from_sequences([list(range(length))], [1])])[0]


@cache
def row_and_mask(seed, spare, stretch, name):
    row = random_row(seed, trees=6, spare=spare, stretch=stretch)
    return row, seen_by_walking_up(row, KNOWN[name][1])


def blocks_by_brute_force(visible, query_block, key_block):
    """Anything and everything visible, from all entries; what lies behind the row's end is not visible."""
    size = len(visible)
    padded = torch.zeros(size + -size % query_block, size + -size % key_block, dtype=torch.bool)
    padded[:size, :size] = visible
    cells = padded.view(-1, query_block, padded.shape[1] // key_block, key_block).transpose(1, 2).flatten(2)
    return cells.any(-1), cells.all(-1)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("seed", range(4))
def test_visible_nodes_by_walking_up(seed, name):
    rule, allowed = KNOWN[name]
    row = random_row(seed)
    assert torch.equal(visible_nodes(row, rule), seen_by_walking_up(row, allowed))


@pytest.mark.parametrize("name", OTHER)
def test_visible_nodes_of_a_rule_known_by_its_function(name):
    row = random_row(5)
    expected = seen_by_walking_up(row, lambda q, k: k == q or (q - k < 9 and k % 3 != q % 2))
    assert torch.equal(visible_nodes(row, OTHER[name]), expected)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "blocks", [(1, 1), (2, 8), (8, 2), (16, 16), (24, 12), (128, 48), (48, 128), (128, 128)], ids=str
)
@pytest.mark.parametrize(("seed", "stretch"), [(0, 1), (1, 1), (2, 1), (3, 5), (4, 6)])
def test_blocks_of_known_rules_are_exact(seed, stretch, blocks, name):
    row, visible = row_and_mask(seed, 3 * seed, stretch, name)
    some, everything = blocks_by_brute_force(visible, *blocks)
    got_some, got_everything = visible_blocks(row, KNOWN[name][0], *blocks)
    assert torch.equal(got_some, some)
    assert torch.equal(got_everything, everything)


@pytest.mark.parametrize("name", ["causal", "window-5", "chunk-7"])
def test_blocks_where_the_row_ends_with_a_block(name):
    rule, allowed = KNOWN[name]
    for spare in (0, 9):
        tokens = random_row(6, spare=0).num_tokens
        row = random_row(6, spare=-tokens % 12 + 12 * spare)
        some, everything = blocks_by_brute_force(seen_by_walking_up(row, allowed), 12, 4)
        got_some, got_everything = visible_blocks(row, rule, 12, 4)
        assert torch.equal(got_some, some)
        assert torch.equal(got_everything, everything)


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_of_padding_hold_its_diagonal(name):
    some, everything = visible_blocks(empty_row(21), KNOWN[name][0], 4)
    assert torch.equal(some, torch.eye(6, dtype=torch.bool))
    assert not everything.any()


def test_one_block_size_is_for_queries_and_keys():
    row = random_row(1)
    for one, two in zip(visible_blocks(row, CAUSAL, 8), visible_blocks(row, CAUSAL, 8, 8), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("blocks", [(1, 1), (2, 8), (8, 2), (16, 16), (24, 12), (128, 48)], ids=str)
@pytest.mark.parametrize(("seed", "stretch"), [(0, 1), (1, 1), (2, 4)])
def test_blocks_of_a_function_alone_lose_nothing(seed, stretch, blocks, name):
    row = random_row(seed, trees=6, spare=2 * seed, stretch=stretch)
    visible = seen_by_walking_up(row, lambda q, k: k == q or (q - k < 9 and k % 3 != q % 2))
    some, _ = blocks_by_brute_force(visible, *blocks)
    got_some, got_everything = visible_blocks(row, OTHER[name], *blocks)
    assert not (some & ~got_some).any()
    assert not got_everything.any()


def test_reach_is_all_that_a_function_needs_to_lose_nothing():
    """A rule that sees exactly as far as its reach says, and keys that far back alone."""
    row = random_row(3, stretch=3)
    rule = Rule(lambda b, h, q, k: (k == q) | (k == q - 8), reach=9)
    visible = seen_by_walking_up(row, lambda q, k: q - k in (0, 8))
    for blocks in ((1, 1), (4, 4), (2, 6), (7, 3)):
        some, _ = blocks_by_brute_force(visible, *blocks)
        assert not (some & ~visible_blocks(row, rule, *blocks)[0]).any()


@pytest.mark.parametrize("rule", [sliding_window(5), chunks(7), OTHER["reach"]], ids=["window", "chunk", "reach"])
def test_short_sight_empties_far_blocks(rule):
    some, _ = visible_blocks(long_path(), rule, 16)
    assert int(some.sum()) <= 2 * some.shape[0]


@pytest.mark.parametrize("name", ["window-5", "window-40", "chunk-7"])
@pytest.mark.parametrize("most", [1, 300, 5000])
def test_blocks_from_smaller_temporaries(most, name, monkeypatch):
    row, visible = row_and_mask(8, 5, 4, name)
    monkeypatch.setattr(mask_module, "_MOST_ENTRIES", most)
    for blocks in ((8, 8), (24, 12), (128, 48)):
        some, everything = blocks_by_brute_force(visible, *blocks)
        got_some, got_everything = visible_blocks(row, KNOWN[name][0], *blocks)
        assert torch.equal(got_some, some)
        assert torch.equal(got_everything, everything)


def test_temporaries_stay_small(monkeypatch):
    row = long_path(960)
    monkeypatch.setattr(mask_module, "_MOST_ENTRIES", 4 * len(row))
    sizes = []
    minimum = torch.minimum

    def watched(*args):
        sizes.append((result := minimum(*args)).numel())
        return result

    monkeypatch.setattr(torch, "minimum", watched)
    visible_blocks(row, sliding_window(5), 16)
    assert sizes == [4 * len(row)] * 15


@pytest.mark.parametrize("name", KNOWN)
def test_lowest_is_the_first_position_that_the_function_lets_see(name):
    rule, allowed = KNOWN[name]
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 14, 38, 39, 40, 41, 77, 80, 3])
    expected = [next(k for k in range(q + 1) if allowed(q, k)) for q in positions.tolist()]
    assert rule.lowest(positions).tolist() == expected
    every = torch.arange(90)
    by_lowest = (every[None, :] <= positions[:, None]) & (every[None, :] >= rule.lowest(positions)[:, None])
    assert torch.equal(rule(positions, every), by_lowest)


def test_what_rules_know_of_themselves():
    assert all(rule.known for rule, _ in KNOWN.values())
    assert not any(rule.known for rule in OTHER.values())
    with pytest.raises(ValueError, match="function alone"):
        OTHER["reach"].lowest(torch.arange(3))
    assert sliding_window(5).key == sliding_window(5).key
    keys = {rule.key for rule in (*(rule for rule, _ in KNOWN.values()), chunks(5), *OTHER.values())}
    assert len(keys) == len(KNOWN) + 2


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 11), (13, 4)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_block_lists_against_python_lists(shape, density):
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(shape, generator=generator) < density
    everything = some & (torch.rand(shape, generator=generator) < 0.5)
    for first, second in ((some, everything), (some.T, everything.T)):
        rows, columns = first.shape
        lists = block_lists(first, second)
        assert [tuple(x.shape) for x in lists] == [(1, 1, rows), (1, 1, rows, columns)] * 2
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists)
        a, b = first.tolist(), second.tolist()
        for i in range(rows):
            partial = [j for j in range(columns) if a[i][j] and not b[i][j]]
            full = [j for j in range(columns) if b[i][j]]
            for counts, indices, expected in (
                (lists.partial_counts, lists.partial_indices, partial),
                (lists.full_counts, lists.full_indices, full),
            ):
                assert int(counts[0, 0, i]) == len(expected)
                assert indices[0, 0, i, : len(expected)].tolist() == expected
        # Kernels may fetch an entry ahead.
        for indices in (lists.partial_indices, lists.full_indices):
            assert 0 <= int(indices.min()) <= int(indices.max()) < columns


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(("seed", "spare"), [(0, 0), (1, 1), (2, 37), (3, 5)])
def test_two_runs_are_what_queries_see(seed, spare, name):
    rule, allowed = KNOWN[name]
    row = shallow_row(seed, spare)
    runs = two_runs(row, rule)
    assert runs.dtype == torch.int32
    # Tiles reach behind the row's end.
    assert runs.shape[1] >= len(row) + 192
    visible = seen_by_walking_up(row, allowed)
    for query, (start, stop, second) in enumerate(runs[:, : len(row)].T.tolist()):
        assert [*range(start, stop), *range(second, query + 1)] == visible[query].nonzero().flatten().tolist()
    assert two_runs(row, rule) is runs


def test_paths_in_three_pieces_are_not_two_runs():
    """Below a second response that branches."""
    members = [[1, 2, 3], [1, 4, 5, 6], [1, 4, 7]]
    tree = preftree.TokenTree.from_sequences(members, [1] * 3)
    for rule in (CAUSAL, sliding_window(2)):
        row = preftree.pack([tree])[0]
        assert two_runs(row, rule) is None
        assert two_runs(row, rule) is None
    row = empty_row(5)
    assert two_runs(row, CAUSAL)[:, :5].tolist() == [[0] * 5, [0] * 5, [0, 1, 2, 3, 4]]
