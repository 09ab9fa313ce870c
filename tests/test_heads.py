"""Normed and rotated heads by one product: autograd's numbers and gradients, told from what only looks like them."""

import pytest
import torch
from test_fusions import by_slices, calls, fusing, graphs_of, norm, rotated
from torch import nn

from preftree.models import compiled, heads, operator, products

linear = nn.functional.linear
HEADS = calls(torch.ops.preftree.normed_heads.default)


def projected(x, weight, size):
    return linear(x, weight).view(*x.shape[:-1], -1, size)


def stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    size = len(q_scale)
    q, k = (
        rotated(norm(projected(x, weight, size), scale).transpose(1, 2), cos, sin, by_slices)
        for weight, scale in ((query, q_scale), (key, k_scale))
    )
    return q, k, projected(x, value, value_size).transpose(1, 2)


def example(batch=2, tokens=5, inner=14, q_heads=4, groups=2, size=6, value_size=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [random(n, inner) for n in (q_heads * size, groups * size, groups * value_size)]
    angles = random(batch, 1, tokens, size)
    return [random(batch, tokens, inner), *weights, random(size), random(size), angles.cos(), angles.sin()], value_size


def by_operator(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    scales_and_rest = q_scale, k_scale, 1e-6, x.dtype, cos, sin, value_size
    return torch.ops.preftree.normed_heads(x, query, key, value, *scales_and_rest)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("trained", [range(6), [0], [0, 1], [1, 3], [4], [0, 5]])
@pytest.mark.parametrize("shape", [{}, {"batch": 1, "groups": 1}, {"q_heads": 1, "groups": 1, "size": 2}])
def test_gradients_are_autograd_s(shape, trained, apart):
    given, value_size = example(**shape)
    if not apart:
        sizes = [len(weight) for weight in given[1:4]]
        given[1:4] = torch.cat(given[1:4]).split(sizes)
    results = []
    for function in (by_operator, stock):
        # Parts of one tensor stay that when they are trained.
        own = [x.detach().requires_grad_(place in trained) for place, x in enumerate(given)]
        out = function(*own, value_size)
        factors = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in out]
        total = sum((x * factor).sum() for x, factor in zip(out, factors, strict=True))
        results.append([*out, *torch.autograd.grad(total, [own[place] for place in trained])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # norms are float32 inside


def test_operators_keep_their_contracts():
    (x, *weights, q_scale, k_scale, cos, sin), value_size = example()
    grads = stock(x, *weights, q_scale, k_scale, cos, sin, value_size)
    x_ND = x.flatten(0, 1)
    projected_NE = products.linears(x_ND, weights)
    norms = projected_NE.view(*x.shape[:2], -1), q_scale, k_scale, 1e-6, x.dtype, cos, sin
    for function, given in (
        (products.linears, (x_ND, weights)),
        (products.linears_input_gradient, (projected_NE, weights)),
        (heads._gradients, (*grads, *norms, True)),
        (heads._gradients, (*grads, *norms, False)),
    ):
        torch.library.opcheck(function, given, test_utils=("test_schema", "test_faketensor"))


# Of a whole layer; where a layer's keys are computed alone, or its queries, there is nothing to put together.
@pytest.mark.parametrize(("name", "found"), [("qwen3", [1, 0, 0]), ("llama", [0]), ("gemma3", [0]), ("olmo2", [0])])
@pytest.mark.usefixtures("nothing_compiled")
def test_heads_are_found(name, found, monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    graphs = graphs_of(name, monkeypatch)
    assert [HEADS(graph) for graph in graphs][: len(found)] == found


@pytest.mark.usefixtures("nothing_compiled")
def test_each_reader_of_a_norm_has_its_own_copy(monkeypatch):
    """Gradients are added up by the norm's kernel, not before it."""
    for served in (False, True):
        monkeypatch.setattr(products, "serves", lambda *operands, served=served: served)
        torch._dynamo.reset()
        compiled._compiled_class.cache_clear()
        whole, *_ = graphs_of("qwen3", monkeypatch)
        first = next(node for node in whole.nodes if node.target is torch.ops.preftree.rms_norm.default)
        assert first.args[-1] == (1 if served else 3)
        results = next(node for node in first.users if node.args[1] == 1)
        readers = [[user for user in copy.users if user.target != "size"] for copy in results.users]
        assert [len(each) for each in readers] == [1] * first.args[-1]


class EveryToken:
    """Attends to all tokens: what the operator asks for."""

    def forward(self, layer, q_BHSD, k_BGSD, v_BGSE, scores):
        k, v = (x.repeat_interleave(q_BHSD.shape[1] // x.shape[1], 1) for x in (k_BGSD, v_BGSE))
        weights = (q_BHSD @ k.transpose(-1, -2) * scores.scale).softmax(-1)
        return weights @ v, weights.new_zeros(q_BHSD.shape[:3], dtype=torch.float32)


def attention(q, k, v, handle):
    return operator.row_attention(q, k, v, None, None, handle, 0.5, None, "layer")


def other_inputs(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, k, _ = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, k, projected(x + 1, value, value_size).transpose(1, 2)


def biased(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, k, _ = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, k, linear(x, value, value[:, 0]).view(*x.shape[:-1], -1, value_size).transpose(1, 2)


def values_normed(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, k, v = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, k, nn.functional.normalize(v, dim=-1)


def keys_not_normed(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, _, v = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, rotated(projected(x, key, len(k_scale)).transpose(1, 2), cos, sin, by_slices), v


def keys_rotated_otherwise(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, _, v = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, stock(x, query, key, value, q_scale, k_scale, sin, cos, value_size)[1], v


def keys_by_another_epsilon(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, _, v = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    k = projected(x, key, len(k_scale))
    k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-3) * k_scale
    return q, rotated(k.transpose(1, 2), cos, sin, by_slices), v


def values_and_keys_read_beside(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, k, v = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    return q, k, v, v.mean() + k.mean()


def product_read_beside(x, query, key, value, q_scale, k_scale, cos, sin, value_size):
    q, k, _ = stock(x, query, key, value, q_scale, k_scale, cos, sin, value_size)
    product = linear(x, value)
    return q, k, product.view(*x.shape[:-1], -1, value_size).transpose(1, 2), product.mean()


def input_normed(x, *given):
    normed = norm(x, x.new_ones(x.shape[-1]))
    return stock(normed, *given)


def input_normed_and_read_beside(x, *given):
    normed = norm(x, x.new_ones(x.shape[-1]))
    return *stock(normed, *given), normed.mean()


# And how many heads are found in them.
SPELLINGS = {
    "heads": (stock, 1),
    "of a norm": (input_normed, 1),
    "of a norm, read beside": (input_normed_and_read_beside, 1),
    "values of another input": (other_inputs, 0),
    "a bias": (biased, 0),
    "values normed": (values_normed, 0),
    "keys not normed": (keys_not_normed, 0),
    "keys rotated otherwise": (keys_rotated_otherwise, 0),
    "keys by another epsilon": (keys_by_another_epsilon, 0),
    "values and keys read beside": (values_and_keys_read_beside, 0),
    "product read beside": (product_read_beside, 0),
}


@pytest.mark.parametrize(
    ("heads_of", "expected", "served"),
    [*((*each, True) for each in SPELLINGS.values()), (stock, 0, False)],
    ids=[*SPELLINGS, "nobody serves"],
)
@pytest.mark.usefixtures("nothing_compiled")
def test_heads_are_told_from_others(heads_of, expected, served, monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: served)
    given, value_size = example(dtype=torch.float32)
    mask = EveryToken()
    handle = operator.register(mask, given[0].device)

    def function(*given):
        q, k, v, *beside = heads_of(*given, value_size)
        return attention(q, k, v, handle) + sum(beside)

    look, counts = fusing(HEADS)
    with torch._dynamo.config.patch(specialize_float=True):
        torch.testing.assert_close(torch.compile(function, backend=look)(*given), function(*given))
    assert counts == [expected]


@pytest.mark.usefixtures("nothing_compiled")
def test_a_norm_keeps_the_copies_that_others_read(monkeypatch):
    """Read beside its heads: more than the kernel adds up, so that two readers have one copy."""
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    given, value_size = example(dtype=torch.float32)
    mask = EveryToken()
    handle, scale = operator.register(mask, given[0].device), torch.rand(given[0].shape[-1])

    def function(x, *given):
        normed = norm(x, scale)
        return attention(*stock(normed, *given, value_size), handle).sum() + normed

    look, counts = fusing(HEADS)
    with torch._dynamo.config.patch(specialize_float=True):
        torch.testing.assert_close(torch.compile(function, backend=look)(*given), function(*given))
    assert counts == [1]
