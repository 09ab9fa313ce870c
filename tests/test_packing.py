"""Rows: nothing lost, nothing moved inside its tree, padding seen and scored by nobody, well filled."""

import random

import pytest
import torch

import preftree
from preftree.packing import empty_row, static_length


def random_trees(count, seed=0):
    generator = random.Random(seed)
    trees, sequences, prompts = [], [], []
    for _ in range(count):
        prompt = [generator.randrange(50) for _ in range(generator.randint(1, 12))]
        members = [prompt + [generator.randrange(50) for _ in range(generator.randint(1, 9))] for _ in range(3)]
        trees.append(preftree.TokenTree.from_sequences(members, [len(prompt)] * 3))
        sequences += members
        prompts += [len(prompt)] * 3
    return trees, sequences, prompts


@pytest.mark.parametrize("lengths", [None, 4])
@pytest.mark.parametrize("row_length", [None, 41, 64, 127])
def test_every_sequence_is_in_exactly_one_row(row_length, lengths):
    trees, sequences, prompts = random_trees(17)
    rows = preftree.pack(trees, row_length, pad_token_id=77, lengths=lengths)
    seen = []
    for row in rows:
        if lengths is None:
            assert len(row) == (row_length or sum(len(tree) for tree in trees))
        node = torch.arange(len(row))
        assert torch.equal(row.end[row.num_tokens :], node[row.num_tokens :] + 1)
        assert (row.parent[row.num_tokens :] == -1).all()
        assert (row.input_ids[row.num_tokens :] == 77).all()
        assert (row.position_ids[row.num_tokens :] == 0).all()
        assert row.predicted_nodes.tolist() == sorted(set(row.scored_nodes.tolist()))
        assert torch.equal(row.predicted_nodes[row.scored_index], row.scored_nodes)
        assert row.longest_scored == max(row.scored_lengths.tolist())
        counts = torch.zeros(len(row), dtype=torch.long)
        for number, scored in zip(
            row.sequence_ids.tolist(), row.scored_nodes.split(row.scored_lengths.tolist()), strict=True
        ):
            seen.append(number)
            # Walk up from the last scored node: the path must spell the sequence.
            path, at = [], int(scored[-1])
            while at >= 0:
                path.append(at)
                at = int(row.parent[at])
            path.reverse()
            counts[path] += 1
            assert row.input_ids[path].tolist() == sequences[number]
            assert path[prompts[number] :] == scored.tolist()
        assert torch.equal(row.node_counts, counts)
    assert sorted(seen) == list(range(len(sequences)))


def test_runs_are_the_unbranched_stretches():
    trees, _, _ = random_trees(5, seed=3)
    row = preftree.pack(trees, 300)[0]
    assert [start for start, _, _ in row.runs] == [0, *[stop for _, stop, _ in row.runs][:-1]]
    assert row.runs[-1][1] == row.num_tokens
    for start, stop, before in row.runs:
        assert int(row.parent[start]) == (row.runs[before][1] - 1 if before >= 0 else -1)
        assert row.parent[start + 1 : stop].tolist() == list(range(start, stop - 1))
    children = torch.bincount(row.parent[row.parent >= 0], minlength=len(row))
    ends = [stop - 1 for _, stop, _ in row.runs]
    assert all(children[node] != 1 for node in ends)


def test_fill_of_rows_on_log_normal_lengths():
    generator = torch.Generator().manual_seed(0)

    def lengths(median, sigma, count):
        return (median * torch.exp(sigma * torch.randn(count, generator=generator))).round().long().clamp(8, 4096)

    prompts, chosen, rejected = lengths(382, 0.6, 400), lengths(120, 0.5, 400), lengths(120, 0.5, 400)
    trees = []
    for p, c, r in zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        trees.append(preftree.TokenTree.from_sequences([[1] * p + [2] * c, [1] * p + [3] * r], [p, p]))
    rows = preftree.pack(trees, 8192)
    fills = [row.num_tokens / 8192 for row in rows]
    assert min(fills) == fills[-1]
    assert sum(fills[:-1]) / len(fills[:-1]) >= 0.97


def test_best_fit_decreasing_by_hand():
    """In the order given, best fit would need four rows: (2, 2), (2, 5), (5), (5)."""
    sizes = [2, 2, 2, 5, 5, 5, 1]
    trees = [preftree.TokenTree.from_sequences([list(range(size))], [0]) for size in sizes]
    rows = preftree.pack(trees, 8)
    assert sorted(row.sequence_ids.tolist() for row in rows) == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_tree_that_does_not_fit_is_named():
    trees, _, _ = random_trees(3)
    longest = max(range(3), key=lambda i: len(trees[i]))
    with pytest.raises(ValueError, match=rf"tree {longest} has {len(trees[longest])} tokens"):
        preftree.pack(trees, len(trees[longest]) - 1)
    with pytest.raises(ValueError, match="empty"):
        preftree.pack([])
    with pytest.raises(ValueError, match="positive"):
        preftree.pack(trees, 0)


def test_first_token_of_a_sequence_is_never_scored():
    row = preftree.pack([preftree.TokenTree.from_sequences([[3, 4, 5], [6, 7]], [0, 1])])[0]
    assert row.scored_nodes.tolist() == [1, 2, 4]
    assert row.longest_scored == max(row.scored_lengths.tolist())
    assert row.scored_lengths.tolist() == [2, 1]
    assert row.completion_lengths.tolist() == [3, 1]


def test_repr_and_to():
    row = preftree.pack(random_trees(2)[0], 100)[0]
    assert "PackedRow(100 tokens" in repr(row)
    moved = row.to("meta")
    assert moved.device.type == "meta"
    assert moved.scored_nodes.device.type == "meta"
    assert row.device.type == "cpu"
    assert moved.runs == row.runs


def test_draw_as_text():
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3], [1, 4]], [1, 1])], 5)[0]
    tree = [
        "0-0: 1 token in 2 sequences",
        "  1-2: 2 tokens in 1 sequence",
        "  3-3: 1 token in 1 sequence",
        "4-4: padding",
    ]
    assert row.draw().splitlines()[1:] == [*tree, "#....", "##...", "###..", "#..#.", "....#"]
    large = preftree.pack(random_trees(20)[0])[0]
    lines = large.draw(max_size=16).splitlines()[1:]
    assert lines[16] == f"... and {len(large.runs) - 16} more runs"
    mask = lines[17:]
    assert len(mask) <= 16
    assert all(len(line) == len(mask) for line in mask)


def test_draw_as_picture(tmp_path):
    pytest.importorskip("matplotlib")
    row = preftree.pack(random_trees(2)[0], 100)[0]
    path = row.draw(tmp_path / "row.png")
    assert (tmp_path / "row.png").read_bytes().startswith(b"\x89PNG")
    assert path == str(tmp_path / "row.png")


@pytest.mark.parametrize(("lengths", "most", "padding"), [(4, 40, 0.26), (32, 240, 0.04)])
def test_static_lengths_are_few_and_close(lengths, most, padding):
    found = {static_length(tokens, lengths) for tokens in range(1, 65537, 7)}
    assert len(found) < most
    assert all(static_length(tokens, lengths) == tokens for tokens in found)
    assert all(length % 128 == 0 for length in found)
    for tokens in range(1, 20000, 13):
        assert tokens <= static_length(tokens, lengths) <= max(tokens * (1 + padding), 128) + 128


def of_sizes(*sizes):
    return [preftree.TokenTree.from_sequences([[1] * size], [0]) for size in sizes]


@pytest.mark.parametrize("lengths", [4, 32])
def test_rows_are_no_longer_than_their_number_allows(lengths):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        sizes = torch.randint(1, 900, (25,), generator=generator).tolist()
        trees = of_sizes(*sizes)
        plain, short = preftree.pack(trees, 4000), preftree.pack(trees, 4000, lengths=lengths)
        assert {len(row) for row in plain} == {4000}
        assert len(short) == len(plain)
        assert sorted(torch.cat([row.sequence_ids for row in short]).tolist()) == list(range(25))
        *others, last = (len(row) for row in short)
        assert len(set(others)) == 1
        assert last == min(static_length(short[-1].num_tokens, lengths), others[0])
        assert short[-1].num_tokens == min(row.num_tokens for row in short)
        # In the next shorter ones they would be one more.
        shorter = max(
            static_length(n, lengths) for n in range(128, others[0], 128) if static_length(n, lengths) < others[0]
        )
        assert shorter < max(sizes) or len(preftree.pack(trees, shorter)) > len(short)


def test_a_length_that_is_given_is_never_exceeded():
    assert [len(row) for row in preftree.pack(of_sizes(700, 700, 70), 777, lengths=4)] == [777, 768]
    assert [len(row) for row in preftree.pack(of_sizes(700), 777, lengths=4)] == [768]


def test_no_short_row_is_left_over():
    trees = of_sizes(*[512] * 9)
    assert [len(row) for row in preftree.pack(trees, 4096)] == [4096, 4096]
    assert [len(row) for row in preftree.pack(trees, 4096, lengths=4)] == [2560, 2048]


def test_empty_row_holds_nothing():
    row = empty_row(16, pad_token_id=3)
    assert row.num_sequences == 0
    assert row.input_ids.tolist() == [3] * 16
    assert row.end.tolist() == list(range(1, 17))


def test_where_it_is_already_a_row_is_itself():
    row = preftree.pack(random_trees(2)[0], 100)[0]
    row.derived["plan"] = object()
    assert row.to("cpu") is row
    assert row.to(torch.device("cpu")).derived


def test_what_was_made_from_a_row_stays_with_it(monkeypatch):
    row = preftree.pack(random_trees(2)[0], 100)[0]
    assert row.derived == {}
    row.derived["plan"] = object()
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    for other in (row.to("meta"), row.pin_memory(), preftree.pack(random_trees(2)[0], 100)[0]):
        assert other.derived == {}
        other.derived["mine"] = 1
    assert set(row.derived) == {"plan"}
