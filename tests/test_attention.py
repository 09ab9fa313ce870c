"""Masks and backends: the block mask against S^2 evaluation, runs against the dense specification, gradients too."""

import pytest
import torch
from oracle import random_sequences

import preftree
from preftree.attention import BACKENDS, Scores, choose_backend
from preftree.attention.mask import CAUSAL, Rule, visible_blocks, visible_nodes
from preftree.packing import empty_row

WINDOW = Rule(lambda b, h, q, k: (k <= q) & (k > q - 5), reach=5)
CHUNK = Rule(lambda b, h, q, k: (k <= q) & (k // 7 == q // 7), reach=7)


def random_row(seed, trees=4, spare=6):
    groups = random_sequences(torch.Generator().manual_seed(seed), 90, trees=trees)
    built = [preftree.TokenTree.from_sequences(*group) for group in groups]
    return preftree.pack(built, sum(len(tree) for tree in built) + spare)[0]


def brute_force_visible(row, allowed):
    """Visibility by walking from each query up to its root, positions counted on the way."""
    visible = torch.zeros(len(row), len(row), dtype=torch.bool)
    for query in range(len(row)):
        at = query
        while at >= 0:
            visible[query, at] = allowed(int(row.position_ids[query]), int(row.position_ids[at]))
            at = int(row.parent[at])
    return visible


@pytest.mark.parametrize("seed", range(4))
def test_visible_nodes_by_walking_up(seed):
    row = random_row(seed)
    assert torch.equal(visible_nodes(row), brute_force_visible(row, lambda q, k: True))
    assert torch.equal(visible_nodes(row, WINDOW), brute_force_visible(row, lambda q, k: k > q - 5))
    assert torch.equal(visible_nodes(row, CHUNK), brute_force_visible(row, lambda q, k: k // 7 == q // 7))


@pytest.mark.parametrize("rule", [CAUSAL, WINDOW, CHUNK], ids=["causal", "window", "chunk"])
@pytest.mark.parametrize("block", [1, 2, 8, 16, 128])
@pytest.mark.parametrize("seed", range(6))
def test_blocks_against_full_evaluation(seed, block, rule):
    row = random_row(seed, trees=7, spare=3 * seed)
    visible = visible_nodes(row, rule)
    some, everything = visible_blocks(row, rule, block)
    blocks = -(-len(row) // block)
    for i in range(blocks):
        for j in range(blocks):
            cell = visible[i * block : (i + 1) * block, j * block : (j + 1) * block]
            if rule.causal:
                assert bool(some[i, j]) == bool(cell.any())
                whole = cell.shape[0] == block and bool(cell.all()) and i > j
                assert bool(everything[i, j]) == whole
            else:
                assert bool(some[i, j]) or not cell.any()  # may keep a block that the rule empties, never lose one
                assert not everything[i, j] or bool(cell.all())


def test_window_empties_far_blocks():
    long_path = preftree.TokenTree.from_sequences([list(range(100)) * 10], [1])
    some, _ = visible_blocks(preftree.pack([long_path])[0], WINDOW, 16)
    assert int(some.sum()) <= 2 * some.shape[0]


@pytest.mark.parametrize("rule", [CAUSAL, WINDOW, CHUNK], ids=["causal", "window", "chunk"])
@pytest.mark.parametrize(
    "special", ["plain", "grouped", "softcap", "sinks", "bias", "value size"], ids=lambda name: name.replace(" ", "-")
)
def test_runs_agree_with_dense(special, rule):
    row = random_row(11)
    heads, groups, size, value_size = (1, 1, 7, 7) if special == "plain" else (6, 2, 10, 10)
    if special == "value size":
        value_size = 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(1, heads, len(row), size), draw(1, groups, len(row), size), draw(1, groups, len(row), value_size)
    sinks = draw(heads) if special == "sinks" else None
    bias = draw(1, heads, len(row), len(row)) if special == "bias" else None
    softcap = 1.5 if special == "softcap" else None
    weight = draw(1, heads, len(row), value_size)
    weight[:, :, row.num_tokens :] = 0
    results = []
    for backend in ("dense", "varlen"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, sinks, bias) if x is not None]
        named = dict(
            zip([n for n, x in zip("qkvsb", (q, k, v, sinks, bias), strict=True) if x is not None], inputs, strict=True)
        )
        scores = Scores(0.3, softcap, named.get("s"), named.get("b"))
        out = BACKENDS[backend](row, rule)(named["q"], named["k"], named["v"], scores)
        (out * weight).sum().backward()
        results.append([out[:, :, : row.num_tokens], *[x.grad for x in inputs]])
    for dense, runs in zip(*results, strict=True):
        torch.testing.assert_close(runs, dense, rtol=1e-10, atol=1e-12)


def test_dense_is_written_out_softmax():
    """The specification itself, against a loop over queries."""
    row = random_row(2, trees=2)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, len(row), 5, generator=generator, dtype=torch.float64) for _ in range(3))
    out = BACKENDS["dense"](row, WINDOW)(q, k, v, Scores(0.7, softcap=2.0))
    for query in range(row.num_tokens):
        keys, at = [], query
        while at >= 0:
            if int(row.position_ids[query]) - int(row.position_ids[at]) < 5:
                keys.append(at)
            at = int(row.parent[at])
        for head in range(2):
            weights = (2.0 * torch.tanh(0.7 * k[0, head, keys] @ q[0, head, query] / 2.0)).softmax(0)
            torch.testing.assert_close(out[0, head, query], weights @ v[0, head, keys])


def test_work_of_runs_is_linear_in_packed_trees(monkeypatch):
    """Twice the trees in a row: twice the query-key pairs, not four times."""
    tree = preftree.TokenTree.from_sequences([[1] * 30 + [2] * 9, [1] * 30 + [3] * 5], [30, 30])
    counted = []

    def count(q, k, v, **kwargs):
        counted.append(q.shape[2] * k.shape[2])
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", count)
    for copies in (3, 6):
        row = preftree.pack([tree] * copies)[0]
        counted.clear()
        q = torch.zeros(1, 1, len(row), 4)
        BACKENDS["varlen"](row, CAUSAL)(q, q, q, Scores(1.0))
        assert sum(counted) == copies * (30 * 30 + 9 * 39 + 5 * 35)


def test_row_of_padding():
    row = empty_row(8)
    x = torch.randn(1, 2, 8, 4)
    for backend in ("dense", "varlen"):
        torch.testing.assert_close(BACKENDS[backend](row, CAUSAL)(x, x, x, Scores(1.0)), x)


def test_choice():
    assert choose_backend("auto", torch.device("cpu")) == "varlen"
    assert choose_backend("auto", torch.device("cuda")) == "flex"
    assert choose_backend("dense", torch.device("cuda")) == "dense"
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        choose_backend("fast", torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="no backward pass"):
        choose_backend("flex", torch.device("cpu"))
