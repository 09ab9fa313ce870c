"""Path plans: blocks, keys and the way back against walks up the tree; copies and their gradients against indexing."""

from itertools import chain

import pytest
import torch
from oracle import random_row, walks_up

import preftree
from preftree.attention.copying import copy_to_paths
from preftree.attention.paths import TILE, QueryBlock, plan_paths, query_blocks
from preftree.packing import empty_row

WINDOWS = [None, 1, 2, 5, 40, 1000]
# (seed, stretch): the stretched ones have pieces longer than a tile.
ROWS = [(0, 1), (1, 1), (2, 1), (3, 1), (4, 9), (5, 13)]


def leaves(row):
    parents = set(row.parent.tolist())
    return [node for node in range(row.num_tokens) if node not in parents]


def blocks_by_brute_force(row):
    """Lists of queries: each leaf takes those nodes on its way up that no leaf before it has taken."""
    walks, taken, blocks = walks_up(row), set(), []
    for leaf in leaves(row):
        own = [node for node in reversed(walks[leaf]) if node not in taken]
        taken.update(own)
        blocks.append(own)
    return blocks


def keys_by_brute_force(row, window):
    """For each block the nodes that one of its queries sees, from the root down."""
    walks, keys = walks_up(row), []
    for queries in blocks_by_brute_force(row):
        seen = {key for query in queries for key in walks[query][:window]}
        keys.append([node for node in reversed(walks[queries[-1]]) if node in seen])
    return keys


def key_list_by_brute_force(row, window):
    return list(chain.from_iterable(keys_by_brute_force(row, window)))


def flat(intervals):
    return [node for interval in intervals for node in range(*interval)]


@pytest.mark.parametrize(("seed", "stretch"), ROWS)
def test_blocks_partition_the_row_and_spell_its_paths(seed, stretch):
    row = random_row(seed, trees=5, stretch=stretch)
    blocks = query_blocks(row.runs)
    assert [list(range(block.start, block.stop)) for block in blocks] == blocks_by_brute_force(row)
    assert flat((block.start, block.stop) for block in blocks) == list(range(row.num_tokens))
    assert len(blocks) == len(leaves(row))
    walks = walks_up(row)
    for block in blocks:
        assert flat((*block.above, (block.start, block.stop))) == walks[block.stop - 1][::-1]
        assert block.depth == len(walks[block.start]) - 1


def test_blocks_run_along_first_children():
    """By hand: 1 2 3, its branches 4 (below 2) and 5 6 (below 1), then a tree of one path."""
    tree = preftree.TokenTree.from_sequences([[1, 2, 3], [1, 2, 4], [1, 5, 6]], [1, 1, 1])
    path = preftree.TokenTree.from_sequences([[7, 8]], [1])
    row = preftree.pack([tree, path], 10)[0]
    assert query_blocks(row.runs) == [
        QueryBlock(0, 3, ()),
        QueryBlock(3, 4, ((0, 2),)),
        QueryBlock(4, 6, ((0, 1),)),
        QueryBlock(6, 8, ()),
    ]


def test_a_path_below_a_block_that_runs_on():
    """Branches of a branch: the interval above ends at the node that branches, not where its block ends."""
    tree = preftree.TokenTree.from_sequences(
        [[1, 2, 3], [1, 4, 5, 6, 7], [1, 4, 5, 8, 9], [1, 4, 5, 8, 10], [11, 12]], [1, 1, 1, 1, 0]
    )
    assert query_blocks(preftree.pack([tree])[0].runs) == [
        QueryBlock(0, 3, ()),
        QueryBlock(3, 7, ((0, 1),)),
        QueryBlock(7, 9, ((0, 1), (3, 5))),
        QueryBlock(9, 10, ((0, 1), (3, 5), (7, 8))),
        QueryBlock(10, 12, ()),
    ]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("seed", "stretch"), ROWS)
def test_keys_are_those_that_a_query_sees(seed, stretch, window):
    row = random_row(seed, trees=5, stretch=stretch)
    expected = keys_by_brute_force(row, window)
    for block, keys in zip(query_blocks(row.runs), expected, strict=True):
        intervals = block.keys(window)
        assert flat(intervals) == keys
        assert all(start < stop for start, stop in intervals)
        assert intervals[-1] == (block.start, block.stop)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("seed", "stretch"), ROWS)
def test_plan_against_brute_force(seed, stretch, window):
    row = random_row(seed, trees=5, stretch=stretch)
    plan = plan_paths(row, window)
    queries, keys = blocks_by_brute_force(row), keys_by_brute_force(row, window)
    key_list = key_list_by_brute_force(row, window)
    assert (plan.num_tokens, plan.num_keys) == (row.num_tokens, len(key_list))
    assert plan.query_starts.tolist() == [sum(map(len, queries[:i])) for i in range(len(queries) + 1)]
    assert plan.key_starts.tolist() == [sum(map(len, keys[:i])) for i in range(len(keys) + 1)]
    assert (plan.longest_queries, plan.longest_keys) == (max(map(len, queries)), max(map(len, keys)))
    tables = (plan.query_starts, plan.key_starts, plan.copies, plan.sources, plan.origins)
    assert all(table.dtype == torch.int32 for table in tables)

    copies = plan.copies.tolist()
    written = [(to + i, start + i) for start, to, length in copies for i in range(length)]
    assert sorted(written) == list(enumerate(key_list))
    assert all(1 <= length <= TILE for _, _, length in copies)

    places = {}
    for place, node in enumerate(key_list):
        places.setdefault(node, []).append(place)
    origins = [offset for offset, _ in plan.origins.tolist()]
    sources = [(node, length, origins[first:last]) for node, length, first, last in plan.sources.tolist()]
    nodes = [node + i for node, length, _ in sources for i in range(length)]
    assert nodes == list(range(row.num_tokens))
    for node, length, offsets in sources:
        for i in range(node, node + length):
            assert sorted(i + offset for offset in offsets) == places[i]
    assert all(1 <= length <= TILE for _, length, _ in sources)
    starts = plan.key_starts.tolist()
    for node, length, first, last in plan.sources.tolist():
        for offset, block in plan.origins.tolist()[first:last]:
            assert starts[block] <= node + offset <= node + length - 1 + offset < starts[block + 1]


def test_keys_lie_in_place_where_no_block_sees_one_above_it():
    alone = preftree.pack(
        [preftree.TokenTree.from_sequences([[i] * size], [1]) for i, size in enumerate((3, 1, 7))], 15
    )
    for window in (None, 1, 4):
        plan = plan_paths(alone[0], window)
        assert plan.in_place
        assert key_list_by_brute_force(alone[0], window) == list(range(11))
    assert [plan_paths(random_row(0), window).in_place for window in (None, 1, 2)] == [False, True, False]


def test_plan_of_padding():
    plan = plan_paths(empty_row(9))
    assert (plan.num_tokens, plan.num_keys, plan.longest_queries, plan.longest_keys) == (0, 0, 0, 0)
    assert plan.query_starts.tolist() == plan.key_starts.tolist() == [0]
    x = torch.randn(9, 2, 3, requires_grad=True)
    k, v = copy_to_paths(x, x, plan)
    assert k.shape == v.shape == (0, 2, 3)
    (k.sum() + v.sum()).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_plans_are_made_once_for_a_row_and_a_window():
    row, twin = random_row(1), random_row(1)
    plans = {window: plan_paths(row, window) for window in (None, 5, 6)}
    assert all(plan_paths(row, window) is plan for window, plan in plans.items())
    assert len({id(plan) for plan in plans.values()}) == 3
    assert plan_paths(twin) is not plans[None]
    assert plans[5].num_keys != plans[6].num_keys


def draw_heads(row, dtype=torch.float64, seed=0):
    """Keys and values as layers have them: ``[S, G, ...]`` seen through a transposition."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, len(row), size, generator=generator, dtype=dtype).transpose(0, 1).requires_grad_()
        for size in (5, 4)
    ]


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    """What code allocates and does not write shows as NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(float("nan"))
    )


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("seed", "stretch"), ROWS)
def test_copies_and_gradients_are_those_of_indexing(seed, stretch, window):
    row = random_row(seed, trees=5, stretch=stretch)
    index = torch.tensor(key_list_by_brute_force(row, window))
    k, v = draw_heads(row)
    got = copy_to_paths(k, v, plan_paths(row, window))
    expected = [x.index_select(0, index) for x in (k, v)]
    weights = [torch.randn_like(x) for x in expected]
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)
    got_gradients = torch.autograd.grad(got, (k, v), weights)
    for one, two in zip(got_gradients, torch.autograd.grad(expected, (k, v), weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-13)
    for gradient in got_gradients:
        assert torch.equal(gradient[row.num_tokens :], torch.zeros_like(gradient[row.num_tokens :]))


def test_gradient_through_one_output_alone():
    row = random_row(0)
    index = torch.tensor(key_list_by_brute_force(row, None))
    for which in (0, 1):
        inputs = draw_heads(row)
        copy_to_paths(*inputs, plan_paths(row))[which].square().sum().backward()
        twins = draw_heads(row)
        twins[which].index_select(0, index).square().sum().backward()
        torch.testing.assert_close(inputs[which].grad, twins[which].grad, rtol=1e-13, atol=1e-13)
        other = inputs[1 - which].grad
        assert other is None or not other.any()


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window):
    tree = preftree.TokenTree.from_sequences([[1, 2, 3], [1, 2, 4], [1, 5, 6]], [1, 1, 1])
    row = preftree.pack([tree], 8)[0]
    k, v = (torch.randn(8, 2, size, dtype=torch.float64, requires_grad=True) for size in (2, 1))
    assert torch.autograd.gradcheck(lambda k, v: copy_to_paths(k, v, plan_paths(row, window)), (k, v))


def test_bfloat16_gradients_are_summed_in_float32():
    """Addends whose sums float32 holds exactly, and bfloat16 does not: a sum rounded once is one definite number."""
    row = preftree.pack([preftree.TokenTree.from_sequences([[1] * 9 + [i] * 3 for i in range(2, 14)], [9] * 12)], 60)[0]
    index = torch.tensor(key_list_by_brute_force(row, None))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.zeros(60, 2, size, dtype=torch.bfloat16, requires_grad=True) for size in (5, 4))
    k_copy, v_copy = copy_to_paths(k, v, plan_paths(row))
    gradients = [
        (torch.randint(-255, 256, x.shape, generator=generator) / 64).to(torch.bfloat16) for x in (k_copy, v_copy)
    ]
    got = torch.autograd.grad((k_copy, v_copy), (k, v), gradients)
    for x, one, gradient in zip((k, v), got, gradients, strict=True):
        exact = torch.zeros(x.shape, dtype=torch.float32).index_add(0, index, gradient.float())
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, exact.to(torch.bfloat16))
        rounded_each_time = torch.zeros_like(one)
        for place, node in enumerate(index.tolist()):
            rounded_each_time[node] += gradient[place]
        assert not torch.equal(one, rounded_each_time)


def test_copying_is_a_lawful_operator():
    row = random_row(2)
    for window in (None, 3):
        plan = plan_paths(row, window)
        arguments = (*draw_heads(row, torch.float32), plan.copies, plan.sources, plan.origins)
        torch.library.opcheck(torch.ops.preftree.copy_to_paths.default, (*arguments, plan.num_keys, plan.num_tokens))
        gradients = [torch.randn(plan.num_keys, 3, size) for size in (5, 4)]
        arguments = (*gradients, plan.sources, plan.origins, plan.num_tokens, len(row))
        torch.library.opcheck(torch.ops.preftree.sum_from_paths.default, arguments)
