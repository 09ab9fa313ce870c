"""Half precision on a GPU: deep models are accepted, compiled layers are as near to float32 and compile once."""

import copy

import pytest
import torch
from families import VOCABULARY, build
from oracle import row_of_lengths
from torch._dynamo.utils import counters

import preftree
from preftree.attention import fa4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEEP = {"num_hidden_layers": 28, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}


def row_of(seed, *lengths):
    return row_of_lengths(seed, VOCABULARY, 3, *lengths).to("cuda")


def numbers(model, row):
    model.zero_grad()
    out = preftree.sequence_logps(model, row)
    (out.logps * torch.linspace(-1, 1, len(out.logps), device="cuda")).sum().backward()
    return [out.logps.detach().double(), *[p.grad.double() for p in model.parameters() if p.grad is not None]]


def lifelike(family):
    """A deep model with weights as small as trained ones: with large ones nothing but rounding is left of its gradients."""
    model = build(family, DEEP)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.cuda()


@pytest.mark.parametrize("backend", ["flash", "varlen"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_compiled_layers_in_bf16(family, backend):
    """As near to float32 as the layers as they are; a small tensor's rounding is chance, that of all of them is not."""
    if backend == "flash" and isinstance(fa4.library(), str):
        pytest.skip(fa4.library())
    exact = lifelike(family)
    plain = preftree.prepare_model(copy.deepcopy(exact).bfloat16(), backend)
    fast = preftree.prepare_model(copy.deepcopy(exact).bfloat16(), backend, compile=True)
    preftree.prepare_model(exact, backend="dense")
    torch._dynamo.reset()
    counters.clear()
    for index, row in enumerate(
        [row_of(0, 300, 70, 90), row_of(1, 200, 110, 60), row_of(2, 41, 33, 20), row_of(3, 500, 9)]
    ):
        truth, uncompiled, compiled = (numbers(model, row) for model in (exact, plain, fast))
        if index == 1:
            # Lengths are symbolic once a second one has been seen, at the latest.
            compilations = counters["stats"]["unique_graphs"]
        ratios = []
        for one, other, third in zip(truth, uncompiled, compiled, strict=True):
            assert (other - one).norm() <= 0.1 * one.norm()
            ratios.append(float((third - one).norm() / (other - one).norm()))
        assert sum(ratios) / len(ratios) <= 1.05
    assert counters["stats"]["unique_graphs"] == compilations > 0
