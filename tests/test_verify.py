"""The check when a model is prepared: rounding passes in every type, wrong arithmetic in none."""

from dataclasses import replace

import pytest
import torch
from families import build

import preftree
from preftree.models import verify
from preftree.packing import pack

DEEP = {"num_hidden_layers": 16, "hidden_size": 96, "intermediate_size": 160, "head_dim": 24}


@pytest.fixture
def alike_at_any_length(monkeypatch):
    """As some devices' kernels do, the stock model computes a token to the bit alike whatever stands behind it."""
    stock_hidden = verify._stock_hidden
    lengths = {len(sequence) for sequence in verify._trees(100)[1]}

    def by_halves(prepared, ids):
        length = ids.shape[1]
        if length % 2 or length // 2 not in lengths or length in lengths:
            return stock_hidden(prepared, ids)
        first = stock_hidden(prepared, ids[:, : length // 2])
        return torch.cat((first, first))

    monkeypatch.setattr(verify, "_stock_hidden", by_halves)


@pytest.mark.usefixtures("alike_at_any_length")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_rounding_of_a_deep_model_is_accepted(family, dtype):
    """Dense attention in half precision rounds weights that SDPA does not."""
    preftree.prepare_model(build(family, DEEP).to(dtype), backend="dense")


def wrong_positions(row):
    return replace(row, position_ids=torch.arange(len(row)))


def sees_its_sibling(row):
    """The first response of the second tree is seen by the other one."""
    end = row.end.clone()
    stop = row.num_tokens
    branch = int((row.parent[:stop] != torch.arange(stop) - 1).nonzero()[-1])
    first = int(row.parent[branch]) + 1
    end[first:branch] = stop
    return replace(row, end=end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_wrong_arithmetic_is_refused(family, dtype, monkeypatch):
    monkeypatch.setattr(
        verify, "pack", lambda *args, **options: [wrong_positions(row) for row in pack(*args, **options)]
    )
    with pytest.raises(NotImplementedError, match="differ from the stock model's"):
        preftree.prepare_model(build(family, DEEP).to(dtype), backend="dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_wrong_attention_is_left_for_paths(family, dtype, monkeypatch):
    """Which do not look at what the mask says; that they serve, and why, is warned of."""
    monkeypatch.setattr(
        verify, "pack", lambda *args, **options: [sees_its_sibling(row) for row in pack(*args, **options)]
    )
    with pytest.warns(UserWarning, match=f"{family}Attention run along each path .* differ from the stock model's"):
        model = preftree.prepare_model(build(family, DEEP).to(dtype), backend="dense")
    assert len(model._preftree.along_paths) == len(model.model.layers)


def test_kernels_without_a_fixed_order_are_no_noise(monkeypatch):
    """Two runs of one seed that differ as much as two of different seeds are accepted; a model that draws noise is not."""
    stock_hidden = verify._stock_hidden
    shaken = torch.Generator().manual_seed(0)

    def unsteady(prepared, ids):
        hidden = stock_hidden(prepared, ids)
        return hidden * (1 + 1e-3 * torch.randn(hidden.shape, generator=shaken)) if prepared.model.training else hidden

    monkeypatch.setattr(verify, "_stock_hidden", unsteady)
    preftree.prepare_model(build("Llama", {}))

    def drawn(prepared, ids):
        hidden = stock_hidden(prepared, ids)
        return hidden * (1 + 1e-3 * torch.randn(hidden.shape)) if prepared.model.training else hidden

    monkeypatch.setattr(verify, "_stock_hidden", drawn)
    with pytest.raises(NotImplementedError, match="in training its forward pass is random"):
        preftree.prepare_model(build("Llama", {}))
