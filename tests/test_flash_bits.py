"""The bits of a block's threads against the mask's entries, with stand-ins for the compiler of the kernels.

The registers of a warp group are those of Hopper's matrix instructions (PTX ISA, wgmma, accumulator D): a thread has two lines
of 16, eight apart, and of each line two entries of every eight.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import shallow_row

from preftree import attention
from preftree.attention.blocks import nodes_of, two_runs
from preftree.attention.mask import CAUSAL, sliding_window, visible_nodes

ALL = 0xFFFFFFFF


class Entries:
    """Numbers of a thread as ``[queries, keys]``; a part of them is a view."""

    def __init__(self, values, places=None):
        self.values = values
        self.shape = (len(values), len(values[0]))
        self.places = places or [(r, c) for r in range(self.shape[0]) for c in range(self.shape[1])]

    def __getitem__(self, index):
        r, c = index
        if r is not None and c is not None:
            return self.values[r][c]
        lines = range(self.shape[0]) if r is None else [r]
        columns = range(self.shape[1]) if c is None else [c]
        return Entries(self.values, [(line, column) for line in lines for column in columns])


def keep(entries, bits, rank1):
    assert rank1
    for number, (r, c) in enumerate(entries.places):
        if not bits(number // 32) >> number % 32 & 1:
            entries.values[r][c] = -torch.inf


@dataclass(frozen=True)
class ByEntry:
    """The library's class: here it says that it was asked."""

    tile_m: int
    tile_n: int
    swap_AB: bool = False  # noqa: N815
    qhead_per_kvhead_packgqa: int = 1

    def apply_mask(self, acc_S, *given):
        raise NotImplementedError


class Constexpr:
    def __class_getitem__(cls, item):
        return item


class Thread:
    """The places of a thread in a block that lies as ``[lines, entries]``, and what it is asked for them."""

    def __init__(self, number, lines, count, odd=False):
        group, lane = divmod(number, 128)
        warp, lane = divmod(lane, 32)
        first = group * 64 + warp * 16 + lane // 4
        columns = [8 * (e // 2) + e % 2 + 2 * (lane % 4) + (4 if odd else 0) * (e > 3) for e in range(count // 4)]
        self.places = [[(line, column) for column in columns] for line in range(first, lines, 8) if line < first + 16]
        self.lines, self.count, self.odd = lines, count, odd

    def partition_C(self, shape):  # noqa: N802
        assert shape == (self.lines, self.count)
        return self.places

    def get_slice(self, number):
        return Thread(number, self.lines, self.count, self.odd)


def reshaped(places, transpose=False):
    return Entries([list(line) for line in zip(*places, strict=True)] if transpose else [list(line) for line in places])


@pytest.fixture
def bits(monkeypatch):
    """The module, imported with the stand-ins."""
    cute = SimpleNamespace(jit=lambda function: function, make_identity_tensor=tuple, size=int)
    modules: dict[str, dict[str, Any]] = {
        "cutlass": {
            "cute": cute, "Int32": int, "const_expr": lambda value: value, "Constexpr": Constexpr, "min": min, "max": max,
            "range_constexpr": range,
        },
        "cutlass.cute": vars(cute),
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.mask": {
            "AttentionMask": ByEntry,
            "mask_r2p_lambda": keep,
            "r2p_bitmask_below": lambda limit, s: ALL >> min(max((s + 1) * 32 - limit, 0), 32),
            "r2p_bitmask_above": lambda limit, s: ALL << max(limit - s * 32, 0) & ALL,
        },
        "quack": {"layout_utils": SimpleNamespace(reshape_acc_to_mn=reshaped)},
        "preftree.attention.flash_mask": {
            "load": lambda array, index: int(array[index]), "tree_mask": "tree_mask", "tree_mask_of_two": "of two"
        },
    }  # fmt: skip
    for name, held in modules.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "preftree.attention.flash_bits", raising=False)
    monkeypatch.setattr(attention, "flash_bits", None, raising=False)  # importing puts it there
    yield importlib.import_module("preftree.attention.flash_bits")
    sys.modules.pop("preftree.attention.flash_bits", None)


@pytest.mark.parametrize(("tile_m", "tile_n", "swap", "window"), [
    (128, 128, False, None), (192, 128, False, 30), (128, 80, False, None), (128, 112, False, 200),
    (64, 128, True, None), (128, 128, True, None),
])  # fmt: skip
def test_threads_see_what_their_queries_see(bits, tile_m, tile_n, swap, window):
    rule = CAUSAL if window is None else sliding_window(window)
    row = shallow_row(3, 200)
    size = len(row)
    visible = torch.zeros(size + tile_m, size + tile_n, dtype=torch.bool)
    visible[:size, :size] = visible_nodes(row, rule)
    arrays = nodes_of(row, rule)[:1] if swap else two_runs(row, rule)
    mask = bits.TreeMask(tile_m, tile_n, swap)
    lines, count = (tile_n, tile_m) if swap else (tile_m, tile_n)
    masked = 0
    for m_block in range(-(-size // tile_m)):
        for n_block in range(-(-size // tile_n)):
            for number in range(0, lines * 2, 7):
                thread = Thread(number, lines, count)
                given = [[1.0] * len(line) for line in thread.places]
                entries = Entries(reshaped(given, swap).values)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(bits.layout_utils, "reshape_acc_to_mn", lambda x, transpose=False, entries=entries: (
                        entries if x == "scores" else reshaped(x, transpose)
                    ))  # fmt: skip
                    mask.apply_mask(
                        "scores", 0, 0, m_block, n_block, thread, True, False, False,
                        "tree_mask" if swap else "of two", SimpleNamespace(scalars=list(arrays)),
                    )  # fmt: skip
                for places, line in zip(reshaped(thread.places, swap).values, entries.values, strict=True):
                    for place, value in zip(places, line, strict=True):
                        query, key = (place[1], place[0]) if swap else place
                        query, key = m_block * tile_m + query, n_block * tile_n + key
                        if query < size and key < size:
                            assert (value == 1) == visible[query, key], (query, key)
                        else:
                            assert value != 1 or query >= size
                        masked += value != 1
    assert masked


def test_other_masks_and_other_registers_are_the_library_s(bits):
    arrays = SimpleNamespace(scalars=[[0] * 300] * 3)
    for swap, mask, odd in (
        (False, None, False), (False, "tree_mask", False), (True, "of two", False), (False, "of two", True),
        (True, "tree_mask", True),
    ):  # fmt: skip
        thread = Thread(5, 128, 64, odd)
        tiles = (64, 128, True) if swap else (128, 64, False)
        with pytest.raises(NotImplementedError):
            bits.TreeMask(*tiles).apply_mask(
                [[1.0] * 16] * 2, 0, 0, 0, 0, thread, True, False, False, mask, arrays
            )  # fmt: skip
