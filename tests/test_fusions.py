"""What captured layers are rewritten to: found in every spelling, the same numbers and gradients as autograd's."""

import pytest
import torch
from families import exact_model

import preftree
from preftree.models import compiled, rms_norm  # noqa: F401 (registers the operator)
from preftree.models.fusions import fuse

SINGLE, HALF = torch.float32, torch.bfloat16


def stock(x, scale, eps, inner, outer):
    """As Llama's family spells it."""
    x32 = x.to(torch.float32)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (scale * normed.to(inner)).to(outer)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize(
    ("of_x", "of_scale", "inner", "outer"),
    [
        (SINGLE, SINGLE, SINGLE, SINGLE),
        (HALF, HALF, HALF, HALF),
        (HALF, SINGLE, HALF, SINGLE),
        (HALF, HALF, SINGLE, HALF),
    ],
)
def test_gradients_are_autograd_s(of_x, of_scale, inner, outer, readers, beside):
    generator = torch.Generator().manual_seed(readers)
    x = torch.randn(3, 5, 48, generator=generator).to(of_x).requires_grad_()
    scale = torch.randn(48, generator=generator).to(of_scale).requires_grad_()
    factors = torch.randn(readers, 3, 5, 48, generator=generator).to(outer)
    past = torch.randn(3, 5, 48, generator=generator).to(of_x)

    def gradients(itself, results):
        total = sum((result.float() * factor).sum() for result, factor in zip(results, factors, strict=True))
        return torch.autograd.grad(total + (itself * past).float().sum() if beside else total, [x, scale])

    expected = stock(x, scale, 1e-6, inner, outer)
    itself, results = torch.ops.preftree.rms_norm(x, scale, 1e-6, inner, outer, readers)
    assert len(results) == readers
    assert all(torch.equal(result, expected) for result in results)
    precision = {SINGLE: 1e-6, HALF: 0.02}
    for got, own in zip(gradients(itself, results), gradients(x, [expected] * readers), strict=True):
        error = float((got - own).float().abs().max() / own.float().abs().max())
        assert got.dtype == own.dtype
        assert error < precision[got.dtype]


def test_results_without_a_gradient():
    x, scale = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    itself, (first, _) = torch.ops.preftree.rms_norm(x, scale, 1e-6, SINGLE, SINGLE, 2)
    torch.testing.assert_close(
        torch.autograd.grad(first.sum(), x, retain_graph=True),
        torch.autograd.grad(stock(x, scale, 1e-6, SINGLE, SINGLE).sum(), x),
    )
    assert torch.equal(*torch.autograd.grad(itself.sum(), x), torch.ones(4, 8))


# Norms of a layer, of its keys alone and of the rest, one after the other.
@pytest.mark.parametrize(
    ("name", "norms"), [("llama", [2, 1, 2]), ("qwen3", [4, 3, 4]), ("gemma3", [6]), ("olmo2", [4])]
)
@pytest.mark.usefixtures("nothing_compiled")
def test_norms_are_found_in_each_spelling(name, norms, monkeypatch):
    found = []

    def look(module, inputs):
        found.append(len(module.graph.find_nodes(op="call_function", target=torch.ops.preftree.rms_norm.default)))
        assert not module.graph.find_nodes(op="call_function", target=torch.rsqrt)
        return module

    monkeypatch.setattr(compiled, "_BACKEND", look)
    model = preftree.prepare_model(exact_model(name), compile=True)
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3, 4], [1, 2, 5, 6, 7]], [2, 2])])[0]
    preftree.sequence_logps(model, row).logps.sum().backward()
    assert found[: len(norms)] == norms


def norm(x, scale, mean=lambda square: square.mean(-1, keepdim=True), power=2):
    return x * torch.rsqrt(mean(x.pow(power)) + 1e-6) * scale


def centred(x, scale):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale


def root_read_twice(x, scale):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * root * scale + root


def normed_read_twice(x, scale):
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed * scale + normed


def written_into(x, scale):
    return norm(x, scale).add_(1)


def input_written_into(x, scale):
    x = x + 1
    normed = norm(x, scale)
    x += 1
    return normed + x


def input_written_into_before_the_scale(x, scale):
    x = x + 1
    x32 = x.to(torch.float32)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    x += 1
    return normed * scale + x


def written_into_through_a_view(x, scale):
    normed = norm(x, scale)
    normed.view(-1).add_(1)
    return normed + x


OTHERS = {
    "columns": lambda x, scale: norm(x, scale, lambda square: square.mean(0, keepdim=True)),
    "sum": lambda x, scale: norm(x, scale, lambda square: square.sum(-1, keepdim=True)),
    "power": lambda x, scale: norm(x, scale, power=4),
    "scale": lambda x, scale: norm(x, scale[:1]),
    "matrix": lambda x, scale: norm(x, x),
    "centred": centred,
    "root read twice": root_read_twice,
    "normed read twice": normed_read_twice,
    "written into": written_into,
    "written into through a view": written_into_through_a_view,
    "input written into": input_written_into,
    "input written into before the scale": input_written_into_before_the_scale,
}


@pytest.mark.parametrize("function", OTHERS.values(), ids=OTHERS)
@pytest.mark.usefixtures("nothing_compiled")
def test_what_is_no_rms_norm_stays(function):
    x, scale, counts = torch.randn(6, 8), torch.randn(8), []

    def look(module, inputs):
        fuse(module)
        counts.append(len(module.graph.find_nodes(op="call_function", target=torch.ops.preftree.rms_norm.default)))
        return module

    with torch._dynamo.config.patch(specialize_float=True):
        assert torch.equal(torch.compile(function, backend=look)(x, scale), function(x, scale))
        torch.compile(norm, backend=look)(x, scale)
    assert counts == [0, 1]
