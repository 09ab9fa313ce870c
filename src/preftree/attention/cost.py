"""Which backend should train a row fastest: a cost model over the row's own tree.

The time of a layer's forward and backward pass is taken to be linear in what a backend computes: a fixed part, the row's
tokens, and 128 x 128 tiles of scores; for `varlen` also the keys that it copies and the number of its blocks. The factors
are fitted by ``benchmarks/attention_cost.py``, per head size, for 32 query heads; time is proportional to the heads. Under a
window tiles cost more: kernels mask at both of its ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preftree.attention.layer import Layer
from preftree.attention.paths import query_blocks
from preftree.packing import PackedRow

TILE = 128
_HEADS = 32

# Milliseconds: {major compute capability: {head size: {backend: factor of each feature, in the order of `features`}}}; under
# a window those of "<backend> window", where there are any.
# H100 80GB HBM3, torch 2.11.0, triton 3.6.0, flash-attn-4 4.0.0b36.
FACTORS: dict[int, dict[int, dict[str, tuple[float, ...]]]] = {
    9: {
        64: {
            "flash": (0.06726, 0.02977, 0.8432, 1.081),
            "varlen": (0.07723, 0.02134, 0.8028, 0.008946, 3.576),
            "flex": (0.3059, 0.0, 1.777, 2.623),
            "flash window": (0.1909, 0.02864, 0.9016, 1.002),
            "varlen window": (0.1293, 0.009766, 0.8439, 0.013, 3.658),
        },
        128: {
            "flash": (0.1171, 0.05167, 1.304, 1.294),
            "varlen": (0.09034, 0.04255, 1.26, 0.01478, 3.842),
            "flex": (0.4572, 0.0, 2.474, 3.464),
            "flash window": (0.1764, 0.0557, 1.315, 1.008),
            "varlen window": (0.1372, 0.03318, 1.227, 0.01841, 3.775),
        },
        256: {
            "flash": (0.08679, 0.09235, 4.786, 3.678),
            "varlen": (0.0, 0.08185, 4.492, 0.02869, 4.201),
            "flex": (0.8974, 0.004389, 12.05, 15.71),
            "flash window": (0.2234, 0.1078, 4.837, 2.344),
            "varlen window": (0.3348, 0.06565, 4.553, 0.01013, 4.949),
        },
    }
}

# The first of several backends is taken unless another one promises to be faster by more than this.
_TIE = 0.03


@dataclass(frozen=True)
class Work:
    """What computing a row's attention takes, counted on the host.

    Attributes:
        length: ``S``, padding included.
        tokens: without the padding, which `varlen` skips.
        full_tiles, partial_tiles: 128 x 128 tiles of the row's mask in which all, or some but not all pairs are visible.
        blocks: of queries, see `paths`.
        copied: keys of all blocks together; none where each token is the key of one block alone and is read in place.
        path_tiles: 128 x 128 tiles of the blocks' scores.
    """

    length: int
    tokens: int
    full_tiles: int
    partial_tiles: int
    blocks: int
    copied: int
    path_tiles: int

    @classmethod
    def of(cls, row: PackedRow, window: int | None = None) -> Work:
        """Counted from the row's runs; counts under a window are a little too high at its border."""
        key = ("work", window)
        if key not in row.derived:
            row.derived[key] = cls(len(row), row.num_tokens, *_mask_tiles(row, window), *_path_tiles(row, window))
        return row.derived[key]

    def features(self, backend: str) -> tuple[float, ...]:
        """What a backend's time is linear in, in thousands."""
        if backend == "varlen":
            return (1.0, self.tokens / 1e3, self.path_tiles / 1e3, self.copied / 1e3, self.blocks / 1e3)
        return (1.0, self.length / 1e3, self.full_tiles / 1e3, self.partial_tiles / 1e3)


def _mask_tiles(row: PackedRow, window: int | None) -> tuple[int, int]:
    size, runs = len(row), row.runs
    ends = [stop for _, stop, _ in runs]
    depths = [0] * len(runs)
    for index, (_, _, before) in enumerate(runs):
        if before >= 0:
            depths[index] = depths[before] + runs[before][1] - runs[before][0]
    for index in range(len(runs) - 1, -1, -1):
        if (before := runs[index][2]) >= 0:
            ends[before] = max(ends[before], ends[index])
    lengths = [stop - start for start, stop, _ in runs]
    node = np.arange(size)
    end, position = node + 1, np.zeros(size, dtype=np.int64)
    if runs:
        end[: row.num_tokens] = np.repeat(ends, lengths)
        starts = np.repeat([start for start, _, _ in runs], lengths)
        position[: row.num_tokens] = node[: row.num_tokens] - starts + np.repeat(depths, lengths)
    first = np.arange(0, size, TILE)
    earlier = first[None, :] < first[:, None]
    some = earlier & (np.maximum.reduceat(end, first)[None, :] > first[:, None])
    everything = earlier & (np.minimum.reduceat(end, first)[None, :] >= first[:, None] + TILE)
    if window is not None:
        lowest, highest = np.minimum.reduceat(position, first), np.maximum.reduceat(position, first)
        some &= lowest[:, None] - highest[None, :] < window
        everything &= highest[:, None] - lowest[None, :] < window
    full = int(everything.sum())
    return full, int(some.sum()) - full + len(first)


def _path_tiles(row: PackedRow, window: int | None) -> tuple[int, int, int]:
    blocks = query_blocks(row.runs)
    keys = tiles = 0
    for block in blocks:
        own = block.stop - block.start
        above = sum(stop - start for start, stop in block.keys(window)) - own
        keys += above + own
        for first in range(0, own, TILE):
            last = above + min(first + TILE, own)
            hidden = 0 if window is None else max(last - TILE - window, 0) // TILE
            tiles += -(-last // TILE) - hidden
    return len(blocks), 0 if keys == row.num_tokens else keys, tiles


def estimate(backend: str, layer: Layer, work: Work) -> float | None:
    """Expected milliseconds of a layer's forward and backward pass; None where nothing has been measured."""
    if layer.capability is None or layer.capability[0] not in FACTORS:
        return None
    sizes = FACTORS[layer.capability[0]]
    fitted = sizes[min(sizes, key=lambda size: abs(size - layer.size))]
    windowed = fitted.get(f"{backend} window") if layer.rule.window is not None else None
    factors = windowed or fitted.get(backend)
    if factors is None:
        return None
    fixed, *scaled = (factor * feature for factor, feature in zip(factors, work.features(backend), strict=True))
    return fixed + sum(scaled) * layer.heads / _HEADS


def fastest(able: Sequence[str], layer: Layer, row: PackedRow) -> str:
    """The backend in ``able`` with the lowest estimate; the first one in a tie, or where nothing has been measured."""
    if len(able) == 1:
        return able[0]
    work = Work.of(row, layer.rule.window)
    estimates = {backend: estimate(backend, layer, work) for backend in able}
    known = {backend: time for backend, time in estimates.items() if time is not None}
    lowest = min(known.values(), default=0.0)
    return next((backend for backend, time in known.items() if time <= lowest * (1 + _TIE)), able[0])
