"""The kernels of gated MLPs: no farther from float32 than the formulas in half precision, at odd sizes."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import preftree
from preftree.kernels import kernels_of
from preftree.models import compiled, products, products_formulas

HALVES = [torch.bfloat16, torch.float16]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def kernels():
    found = kernels_of("preftree.models.products_quack")
    if found is None:
        pytest.skip("quack-kernels is not installed")
    if (refusal := found.refusal(torch.cuda.get_device_capability())) is not None:
        pytest.skip(refusal)
    return found


def error(result, truth):
    return float((result.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", products.ACTIVATIONS)
@pytest.mark.parametrize(
    ("tokens", "size", "features"), [(1, 8, 8), (3, 64, 40), (129, 576, 1536), (1301, 1000, 2744), (8192, 2048, 6144)]
)
def test_products(kernels, tokens, size, features, activation, dtype):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).div(shape[-1] ** 0.5 / 2).to(dtype)

    x, weights, down, grad = (
        random(tokens, size),
        random(2 * features, size),
        random(size, features),
        random(tokens, size),
    )

    def products(by, x, weights, down, grad):
        out, both = by.up(x, weights, activation, True)
        grads, again = by.up_backward(grad, down, both, activation)
        rest = by.input_gradient(grads, weights), by.weight_gradients(grads, x), by.onto(again, down, x)
        return out, both, grads, again, *rest, by.weight_gradients(grads, x, weights.clone())

    truth = products(products_formulas, *(given.float() for given in (x, weights, down, grad)))
    stock = products(products_formulas, x, weights, down, grad)
    got = products(kernels, x, weights, down, grad)
    for one, other, right in zip(got, stock, truth, strict=True):
        assert one.dtype == dtype
        assert one.shape == right.shape
        # What a few numbers are rounded to is chance.
        times, beside = (2, torch.finfo(dtype).eps) if right.numel() < 10000 else (1.05, 1e-4)
        assert error(one, right) <= times * error(other, right) + beside
    alone, nothing = kernels.up(x, weights, activation, False)
    assert torch.equal(alone, got[0])
    assert nothing.numel() == 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.usefixtures("kernels")
def test_gradients(apart):
    """Through the operator, with weights of gate and up behind each other and apart."""
    torch.manual_seed(0)
    mlp = nn.Module()
    mlp.gate, mlp.up, mlp.down = (
        nn.Linear(96, 200, bias=False),
        nn.Linear(96, 200, bias=False),
        nn.Linear(200, 96, bias=False),
    )
    mlp.to("cuda", torch.bfloat16)
    if not apart:
        assert products.side_by_side(mlp) == 2
    x = torch.randn(2, 77, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_()
    given = [x, mlp.gate.weight, mlp.up.weight, mlp.down.weight, residual]
    factor = torch.randn(2, 77, 96, device="cuda")

    def results(function, *given):
        out = function(*given)
        return [out, *torch.autograd.grad((out.float() * factor).sum(), given)]

    def stock(x, gate, up, down, residual):
        return residual + nn.functional.linear(nn.functional.silu(x @ gate.T) * (x @ up.T), down)

    truth = results(stock, *(each.detach().float().requires_grad_() for each in given))
    rounded = results(stock, *given)
    got = results(lambda *given: torch.ops.preftree.gated_mlp(*given, "swiglu"), *given)
    for one, other, right in zip(got, rounded, truth, strict=True):
        assert error(one, right) <= 1.05 * error(other, right) + 1e-4


@pytest.mark.usefixtures("kernels")
def test_compiled_layers_use_them(monkeypatch):
    torch._dynamo.reset()
    compiled._compiled_class.cache_clear()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 328, "num_attention_heads": 4, "num_key_value_heads": 2}
    exact = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes)).cuda()
    plain = preftree.prepare_model(copy.deepcopy(exact).bfloat16())
    fast = preftree.prepare_model(copy.deepcopy(exact).bfloat16(), compile=True)
    preftree.prepare_model(exact, backend="dense")
    used = []
    by_kernels = kernels_of("preftree.models.products_quack").up
    monkeypatch.setattr(
        kernels_of("preftree.models.products_quack"), "up", lambda *given: used.append(given) or by_kernels(*given)
    )
    trees = [preftree.TokenTree.from_sequences([[*range(9), 3, 4], [*range(9), 5, 6, 7]], [5, 5])] * 5
    row = preftree.pack(trees)[0].to("cuda")

    def numbers(model):
        logps = preftree.sequence_logps(model, row).logps
        (logps * torch.linspace(-1, 1, len(logps), device="cuda")).sum().backward()
        return [logps.detach(), *(parameter.grad for parameter in model.parameters())]

    truth, rounded, got = (numbers(model) for model in (exact, plain, fast))
    ratios = [error(one, right) / error(other, right) for one, other, right in zip(got, rounded, truth, strict=True)]
    assert sum(ratios) / len(ratios) <= 1.1
    assert [given[-1] for given in used] == [True] * 3
    for given, layer in zip(used, fast.model.layers, strict=True):
        assert given[1].data_ptr() == layer.mlp.gate_proj.weight.data_ptr()  # both weights, without a copy
    with torch.no_grad():
        logps = preftree.sequence_logps(fast, row).logps
    assert torch.allclose(logps, got[0], atol=0.1)
    assert [given[-1] for given in used[3:]] == [False] * 3
