"""The cost model: its counts against the mask itself, its choice against its estimates."""

from dataclasses import replace

import pytest
import torch
from oracle import random_row, seen_by_walking_up

import preftree
from preftree.attention import BACKENDS, Layer, choose_backend, cost
from preftree.attention.cost import FACTORS, TILE, Work
from preftree.attention.mask import CAUSAL, sliding_window
from preftree.attention.paths import query_blocks
from preftree.packing import empty_row

H100 = Layer("cuda", (9, 0), torch.bfloat16, 32, 8, 128, 128, CAUSAL)


def tiles_by_brute_force(visible):
    """Tiles with all, and with some but not all pairs visible; none is full that the row's end cuts."""
    size = len(visible)
    padded = torch.zeros(size + -size % TILE, size + -size % TILE, dtype=torch.bool)
    padded[:size, :size] = visible
    tiles = padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2).flatten(2)
    return int(tiles.all(-1).sum()), int((tiles.any(-1) & ~tiles.all(-1)).sum())


@pytest.mark.parametrize(("seed", "stretch"), [(0, 1), (1, 9), (2, 12), (3, 20)])
def test_tiles_of_the_mask(seed, stretch):
    row = random_row(seed, trees=4, spare=seed, stretch=stretch)
    work = Work.of(row)
    assert (work.full_tiles, work.partial_tiles) == tiles_by_brute_force(seen_by_walking_up(row, lambda q, k: True))
    assert (work.length, work.tokens) == (len(row), row.num_tokens)


@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tiles_under_a_window_are_never_too_few(seed, window):
    """All that are needed, the full ones exactly, and at most as many again as blocks meet runs."""
    row = random_row(seed, trees=4, spare=seed, stretch=12)
    full, partial = tiles_by_brute_force(seen_by_walking_up(row, lambda q, k: q - k < window))
    work = Work.of(row, window)
    assert work.full_tiles == full
    assert partial <= work.partial_tiles <= partial + len(row) // TILE + len(row.runs)
    assert Work.of(row, 10**6) == Work.of(row)


@pytest.mark.parametrize(("seed", "stretch"), [(0, 1), (1, 9), (2, 15)])
def test_tiles_of_paths(seed, stretch):
    row = random_row(seed, trees=4, spare=seed, stretch=stretch)
    visible = seen_by_walking_up(row, lambda q, k: True)
    keys = tiles = 0
    for block in query_blocks(row.runs):
        keys += int(visible[block.stop - 1].sum())
        for first in range(block.start, block.stop, TILE):
            last = min(first + TILE, block.stop) - 1
            tiles += -(-int(visible[last].sum()) // TILE)
    work = Work.of(row)
    assert (work.blocks, work.copied, work.path_tiles) == (len(query_blocks(row.runs)), keys, tiles)


def test_keys_of_sequences_that_share_nothing_are_not_copied():
    row = preftree.pack([preftree.TokenTree.from_sequences([[i] * 200], [1]) for i in range(3)], 700)[0]
    assert (Work.of(row).blocks, Work.of(row).copied, Work.of(row).path_tiles) == (3, 0, 9)


def test_a_row_of_padding_costs_its_own_tiles():
    assert Work.of(empty_row(300)) == Work(300, 0, 0, 3, 0, 0, 0)


def test_estimates_are_those_of_the_nearest_head_size_and_grow_with_the_heads():
    work = Work.of(random_row(1, stretch=9))
    for backend in ("flash", "varlen", "flex"):
        factors = FACTORS[9][128][backend]
        expected = sum(f * x for f, x in zip(factors, work.features(backend), strict=True))
        assert cost.estimate(backend, H100, work) == pytest.approx(expected)
        assert cost.estimate(backend, replace(H100, size=112), work) == pytest.approx(expected)
        doubled = cost.estimate(backend, replace(H100, heads=64), work)
        assert doubled == pytest.approx(2 * expected - factors[0])
    assert cost.estimate("dense", H100, work) is None
    assert cost.estimate("flash", replace(H100, capability=(8, 0)), work) is None
    assert cost.estimate("flash", replace(H100, device="cpu", capability=None), work) is None


def test_a_window_has_factors_of_its_own_where_they_were_fitted(monkeypatch):
    work = Work.of(random_row(1, stretch=9), 20)
    layer = replace(H100, rule=sliding_window(20))
    monkeypatch.setitem(
        FACTORS, 9, {128: {"flash": (1.0, 0, 0, 0), "flash window": (2.0, 0, 0, 0), "flex": (3.0, 0, 0, 0)}}
    )
    assert [cost.estimate(name, layer, work) for name in ("flash", "flex")] == [2.0, 3.0]
    assert cost.estimate("flash", H100, work) == 1.0


def test_fastest_is_the_lowest_estimate_and_the_first_in_a_tie(monkeypatch):
    row = random_row(1, stretch=9)
    fixed = {"flash": (2.0, 0, 0, 0), "varlen": (1.02, 0, 0, 0, 0), "flex": (1.0, 0, 0, 0)}
    monkeypatch.setitem(FACTORS, 9, {128: fixed})
    assert cost.fastest(["flash", "flex"], H100, row) == "flex"
    assert cost.fastest(["flash", "varlen", "flex"], H100, row) == "varlen"
    assert cost.fastest(["flash", "flex", "varlen"], H100, row) == "flex"
    assert cost.fastest(["varlen"], H100, row) == "varlen"
    assert cost.fastest(["varlen", "flex"], replace(H100, capability=(8, 0)), row) == "varlen"
    monkeypatch.setitem(FACTORS, 9, {128: {name: fixed[name] for name in ("flash", "flex")}})
    assert cost.fastest(["flash", "varlen", "flex"], H100, row) == "flex"


def test_auto_chooses_among_those_that_can_serve(monkeypatch):
    row = random_row(1, stretch=9)
    fixed = {"flash": (1.0, 0, 0, 0), "varlen": (2.0, 0, 0, 0, 0), "flex": (3.0, 0, 0, 0)}
    monkeypatch.setitem(FACTORS, 9, {128: fixed})
    for name in ("flash", "flex"):
        monkeypatch.setattr(BACKENDS[name], "refusal", lambda layer: None)
    for works in (False, True):
        monkeypatch.setattr(BACKENDS["flash"], "works", lambda layer, device, works=works: works)
        assert choose_backend("auto", H100, row) == ("flash" if works else "varlen")
    monkeypatch.setattr(BACKENDS["flash"], "refusal", lambda layer: "not here")
    assert choose_backend("auto", H100, row) == "varlen"


def test_long_rows_take_flash_and_the_estimates_are_plausible():
    """The fitted factors themselves: a long pair is dearer than two short ones, in every backend."""
    pairs = [[[0] * n + [1] * n, [0] * n + [2] * n] for n in (512, 1024)]
    short, long = (preftree.pack([preftree.TokenTree.from_sequences(p, [len(p[0]) // 2] * 2)])[0] for p in pairs)
    for size in FACTORS[9]:
        layer = replace(H100, size=size, value_size=size)
        for backend in ("flash", "varlen", "flex"):
            assert cost.estimate(backend, layer, Work.of(long)) > cost.estimate(backend, layer, Work.of(short))
        assert cost.fastest(["flash", "flex"], layer, long) == "flash"


def test_windows_are_cheaper():
    row = random_row(2, stretch=30)
    narrow, wide = (Work.of(row, sliding_window(w).window) for w in (10, 1000))
    for backend in ("flash", "varlen", "flex"):
        assert cost.estimate(backend, H100, narrow) < cost.estimate(backend, H100, wide)
