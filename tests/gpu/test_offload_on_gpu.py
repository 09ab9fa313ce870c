"""Layers whose weights lie in the host's memory, on a GPU: the same bits again and again, in less of its memory."""

import gc

import pytest
import torch
from families import VOCABULARY, build
from oracle import row_of_lengths

import preftree
from preftree.models import prepared_part
from preftree.models.offload import offload_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZES = {"num_hidden_layers": 9, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}


def row_of(seed, *lengths):
    return row_of_lengths(seed, VOCABULARY, 1, *lengths).to("cuda")


@torch.no_grad()
def logps(model, row):
    return preftree.sequence_logps(model, row).logps


@pytest.mark.parametrize("compile", [False, True])
def test_same_bits_in_less_memory(compile):
    device = torch.device("cuda", torch.cuda.current_device())
    model = preftree.prepare_model(build("Qwen3", SIZES).bfloat16().to(device), compile=compile)
    # From rows that the host is done with at once, to one that the copies are faster than.
    rows = [row_of(0, 30, 7, 9), row_of(1, 6000, 900, 1100), row_of(2, 41, 33, 20)]
    expected = [logps(model, row) for row in rows]
    gc.collect()
    before = torch.cuda.memory_allocated()
    layers = model.model.layers
    size = sum(weight.nbytes for weight in layers[0].parameters())
    offload_layers(prepared_part(model), device)
    assert before - torch.cuda.memory_allocated() > (len(layers) - 2.5) * size
    assert all(weight.is_pinned() for weight in layers.parameters())
    for _ in range(5):
        for row, values in zip(rows, expected, strict=True):
            assert torch.equal(logps(model, row), values)
    with torch.no_grad():
        layers[3].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(logps(model, rows[0]), expected[0])
