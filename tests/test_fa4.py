"""FlashAttention-4's sums of keys' gradients before their conversion, with a made-up library in the place of its kernels."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from preftree.attention import fa4

# More elements than two bytes can number.
TILE, SIZE, LINE = 96, 230, 256


def conversion(order, cluster=1, shift=0):
    """Float32 sums in tiles whose elements lie in an order of their own, to ``[K, G, D]`` in the output's type."""

    def convert(sums, output, scale, starts, used, arch, kind, size, tile, *rest, cu_total_m_blocks=None, **more):
        assert (used, arch, kind, size, tile, rest) == (None, 90, "kind", SIZE, TILE, (256,))
        assert more == {"cluster_size": cluster, "hdim_multiple_of": 32}
        step = tile * cluster
        for block, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            first = (start + block * step) // step * step
            for key in range(stop - start):
                at = (first + key // tile * tile) * LINE + order[key % tile] + (shift if block and key else 0)
                output[start + key] = (sums[:, at] * scale).to(output.dtype)

    return convert


def make_library(convert):
    """A module as far as it is looked at: its backward pass fills the sums with numbers and converts them."""

    def backward(q, k, *, dq, dk, dv, starts, sums, cluster):
        for output, scale in ((dq, 2.0), (dk, 0.5), (dv, 1.0)):
            _bwd_postprocess_convert(  # noqa: F821 -- a name of the library's own
                sums, output, scale, starts, None, 90, "kind", SIZE, TILE, 256,
                cluster_size=cluster, cu_total_m_blocks="the call's own", hdim_multiple_of=32,
            )  # fmt: skip
        return dq, dk, dv, "dsinks"

    return SimpleNamespace(_bwd_postprocess_convert=convert, _flash_attn_bwd=backward, SIZE=SIZE, TILE=TILE)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(fa4, "_layouts", {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cluster", [1, 2])
def test_sums_lie_where_the_conversion_reads_them(cluster, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(TILE * LINE, generator=generator)[: TILE * SIZE].view(TILE, SIZE)
    convert = conversion(order, cluster)
    monkeypatch.setattr(fa4, "library", lambda: make_library(convert))
    lengths = [3, 2 * TILE + 5, 1, TILE]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    lines = (int(starts[-1]) // TILE + 2 * len(lengths) + 2) * TILE * cluster
    sums = torch.randn(2, lines * LINE, generator=generator)
    q, dq, dk, dv = (torch.full((int(starts[-1]), 2, SIZE), 9.0, dtype=dtype) for _ in range(4))
    twins = [torch.empty_like(x) for x in (dq, dk, dv)]
    gradients, held = fa4.backward(q, q, dq=dq, dk=dk, dv=dv, starts=starts, sums=sums, cluster=cluster)
    assert gradients[3] == "dsinks"
    for twin, scale in zip(twins, (2.0, 0.5, 1.0), strict=True):
        convert(sums, twin, scale, starts, None, 90, "kind", SIZE, TILE, 256, cluster_size=cluster, hdim_multiple_of=32)
    assert torch.equal(dq, twins[0])
    assert (dk == 9).all()
    assert (dv == 9).all()
    for name, twin in (("dk", twins[1]), ("dv", twins[2])):
        tiled = held[name]
        assert tiled.order.shape == (TILE, SIZE)
        found = torch.empty(twin.shape)
        for block, start in enumerate(starts[:-1].tolist()):
            for key in range(lengths[block]):
                line = (start + block * tiled.step) // tiled.step * tiled.step + key // TILE * TILE
                found[start + key] = tiled.sums[:, line * tiled.line + tiled.order[key % TILE].long()]
        assert torch.equal((found * tiled.scale).to(dtype), twin)
    assert len(fa4._layouts) == 1


def test_another_layout_is_left_to_the_library(monkeypatch):
    order = torch.arange(TILE * LINE).view(TILE, LINE)[:, :SIZE]
    convert = conversion(order, shift=1)
    monkeypatch.setattr(fa4, "library", lambda: make_library(convert))
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    sums = torch.randn(2, 5 * TILE * LINE)
    q, dq, dk, dv = (torch.full((9, 2, SIZE), 9.0, dtype=torch.bfloat16) for _ in range(4))
    _, held = fa4.backward(q, q, dq=dq, dk=dk, dv=dv, starts=starts, sums=sums, cluster=1)
    assert held == {}
    assert not (dk == 9).any()
    torch.testing.assert_close(dk * 2, dv)


NAMES = ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


@pytest.fixture
def cache_home(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_compiled_kernels_are_kept_on_the_disk(cache_home):
    with fa4.kernels_kept():
        enabled, folder = (os.environ[name] for name in NAMES)
    assert enabled == "1"
    assert Path(folder).is_dir()
    assert Path(folder).is_relative_to(cache_home)
    assert not any(name in os.environ for name in NAMES)
    with pytest.raises(ImportError), fa4.kernels_kept():
        raise ImportError
    assert not any(name in os.environ for name in NAMES)


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], "0"), (NAMES[0], "1"), (NAMES[1], "/elsewhere")])
def test_where_kernels_are_kept_is_the_user_s_to_say(cache_home, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with fa4.kernels_kept():
        assert {each: os.environ[each] for each in NAMES if each in os.environ} == {name: value}
    assert os.environ[name] == value
    assert not list(cache_home.iterdir())


@pytest.mark.parametrize("fault", ["no folder", "no locks"])
def test_nothing_is_kept_where_the_library_could_not(cache_home, monkeypatch, fault):
    if fault == "no folder":
        (cache_home / "preftree").write_text("in the way")
    else:
        fcntl = pytest.importorskip("fcntl")

        def refuse(file, operation):
            raise OSError("no locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    with fa4.kernels_kept():
        assert not any(name in os.environ for name in NAMES)
