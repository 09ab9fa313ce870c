"""What captured layers are rewritten to: found in every spelling, the same numbers and gradients as autograd's."""

import pytest
import torch
from families import exact_model
from torch import nn

import preftree
from preftree.models import compiled, products, rms_norm  # noqa: F401 (registers the operator)
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
    count = calls(torch.ops.preftree.rms_norm.default, torch.ops.preftree.rms_norm_rotated.default)
    graphs = graphs_of(name, monkeypatch)
    assert not any(graph.find_nodes(op="call_function", target=torch.rsqrt) for graph in graphs)
    assert [count(graph) for graph in graphs][: len(norms)] == norms


def norm(x, scale, mean=lambda square: square.mean(-1, keepdim=True), power=2):
    return x * torch.rsqrt(mean(x.pow(power)) + 1e-6) * scale


def fusing(count):
    """A backend that runs graphs as they are rewritten, and what ``count`` finds in them."""
    counts = []

    def look(module, inputs):
        fuse(module)
        counts.append(count(module.graph))
        return module

    return look, counts


def calls(*targets):
    return lambda graph: sum(node.target in targets for node in graph.nodes)


def graphs_of(name, monkeypatch):
    """What the layers of a family are compiled from, rewritten."""
    graphs = []
    monkeypatch.setattr(compiled, "_BACKEND", lambda module, inputs: graphs.append(module.graph) or module)
    model = preftree.prepare_model(exact_model(name), compile=True)
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3, 4], [1, 2, 5, 6, 7]], [2, 2])])[0]
    preftree.sequence_logps(model, row).logps.sum().backward()
    return graphs


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
    x, scale = torch.randn(6, 8), torch.randn(8)
    look, counts = fusing(calls(torch.ops.preftree.rms_norm.default))
    with torch._dynamo.config.patch(specialize_float=True):
        assert torch.equal(torch.compile(function, backend=look)(x, scale), function(x, scale))
        torch.compile(norm, backend=look)(x, scale)
    assert counts == [0, 1]


def rotated(x, cos, sin, halves=lambda x: x.chunk(2, -1)):
    one, two = halves(x)
    return x * cos + torch.cat((-two, one), -1) * sin


@pytest.mark.parametrize(("of_x", "of_scale", "inner"), [(SINGLE, SINGLE, SINGLE), (HALF, HALF, HALF)])
@pytest.mark.parametrize("trained", [[0, 1], [0], [1]])
def test_gradients_of_rotated_heads_are_autograd_s(of_x, of_scale, inner, trained):
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    # Heads of a wider projection.
    x = random(2, 5, 7, 12)[:, :, 2:5].to(of_x)
    scale, angles = random(12).to(of_scale), random(2, 1, 5, 12)
    cos, sin = angles.cos().to(of_x), angles.sin().to(of_x)
    given = [each.requires_grad_(place in trained) for place, each in enumerate((x, scale))]
    wanted = [given[place] for place in trained]
    factors = random(2, 3, 5, 12)

    def results(function):
        out = function(*given)
        return [out, *torch.autograd.grad((out.float() * factors).sum(), wanted)]

    expected = results(lambda x, scale: rotated(stock(x, scale, 1e-6, inner, of_x).transpose(1, 2), cos, sin))
    got = results(lambda x, scale: torch.ops.preftree.rms_norm_rotated(x, scale, 1e-6, inner, of_x, cos, sin))
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert one.dtype == other.dtype
        error = float((one - other).float().abs().max() / other.float().abs().max())
        assert error < {SINGLE: 1e-6, HALF: 0.02}[one.dtype]


def by_slices(x):
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def heads(x, scale):
    return norm(x, scale).transpose(1, 2)


def turned(parts, dim=-1):
    """Heads and their turned halves, spelled out."""

    def function(x, scale, cos, sin):
        normed = heads(x, scale)
        return normed * cos + torch.cat(parts(normed), dim) * sin

    return function


def difference(x, scale, cos, sin):
    normed = heads(x, scale)
    return normed * cos - torch.cat((-normed[..., 4:], normed[..., :4]), -1) * sin


def sines_first(x, scale, cos, sin):
    normed = heads(x, scale)
    return torch.cat((-normed[..., 4:], normed[..., :4]), -1) * sin + cos * normed


def heads_read_twice(x, scale, cos, sin):
    normed = heads(x, scale)
    return rotated(normed, cos, sin, by_slices) + normed


def norm_read_twice(x, scale, cos, sin):
    normed = norm(x, scale)
    return rotated(normed.transpose(1, 2), cos, sin, by_slices).sum() + normed


def narrow(x, scale, cos, sin):
    return x[:, :, :1, :2], scale[:2], cos[..., :2], sin[..., :2]


def angles(change):
    return lambda x, scale, cos, sin: rotated(heads(x, scale), change(cos), change(sin), by_slices)


ROTATIONS = {
    "rotated": (angles(lambda angle: angle), 1),
    "sines first": (sines_first, 1),
    "the other way": (turned(lambda h: (h[..., 4:], -h[..., :4])), 0),
    "halves swapped": (turned(lambda h: (-h[..., :4], h[..., 4:])), 0),
    "unequal parts": (turned(lambda h: (-h[..., 6:], h[..., :6])), 0),
    "tokens for halves": (turned(lambda h: (-h[:, :, 2:], h[:, :, :2]), -2), 0),
    # Of a single head of size 2 alone: halves side by side as two heads, which each broadcast.
    "other dimension": (lambda x, w, c, s: turned(lambda h: (-h[..., 1:], h[..., :1]), 1)(*narrow(x, w, c, s)), 0),
    "not normed": (lambda x, w, c, s: rotated(x.transpose(1, 2), c, s, by_slices), 0),
    "not transposed": (lambda x, w, c, s: rotated(norm(x, w), c.transpose(1, 2), s.transpose(1, 2), by_slices), 0),
    "heads read twice": (heads_read_twice, 0),
    "norm read twice": (norm_read_twice, 0),
    "angles by head": (angles(lambda angle: angle.expand(-1, 2, -1, -1)), 0),
    "one angle for all tokens": (angles(lambda angle: angle[:, :, :1]), 0),
    "angles of another type": (angles(lambda angle: angle.double()), 0),
    "difference": (difference, 0),
}


@pytest.mark.parametrize("trained_angles", [False, True])
@pytest.mark.parametrize(("function", "expected"), ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.usefixtures("nothing_compiled")
def test_rotations_are_told_from_others(function, expected, trained_angles):
    generator = torch.Generator().manual_seed(0)
    x, angle = (torch.randn(shape, generator=generator) for shape in ((1, 5, 2, 8), (1, 1, 5, 8)))
    given = [x, torch.rand(8, generator=generator), angle.cos(), angle.sin()]
    given = [each.requires_grad_(place < 2 or trained_angles) for place, each in enumerate(given)]
    look, counts = fusing(calls(torch.ops.preftree.rms_norm_rotated.default))
    gradients = []
    with torch._dynamo.config.patch(specialize_float=True):
        for run in (torch.compile(function, backend=look), function):
            out = run(*given)
            wanted = [each for each in given if each.requires_grad]
            total = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
            gradients.append([out, *torch.autograd.grad(total, wanted, allow_unused=True)])
    for one, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other)
    assert counts == [0 if trained_angles else expected]


@pytest.mark.parametrize(("name", "found"), [("qwen3", 2), ("llama", 0), ("gemma3", 0), ("olmo2", 0)])
@pytest.mark.usefixtures("nothing_compiled")
def test_rotated_heads_are_found(name, found, monkeypatch):
    whole, *_ = graphs_of(name, monkeypatch)
    assert calls(torch.ops.preftree.rms_norm_rotated.default)(whole) == found


# Gated MLPs with and without the sum behind them, and other products onto the residual stream; of a whole layer.
@pytest.mark.parametrize(
    ("name", "found"), [("llama", (1, 1, 1)), ("qwen3", (1, 1, 1)), ("gemma3", (1, 0, 0)), ("olmo2", (1, 0, 0))]
)
@pytest.mark.usefixtures("nothing_compiled")
def test_products_are_found(name, found, monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    whole, *_ = graphs_of(name, monkeypatch)
    assert counted(whole) == found


def counted(graph):
    operators = torch.ops.preftree
    mlps = graph.find_nodes(op="call_function", target=operators.gated_mlp.default)
    sums = graph.find_nodes(op="call_function", target=operators.linear_onto.default)
    return len(mlps), sum(node.args[4] is not None for node in mlps), len(sums)


linear = nn.functional.linear


def mlp(x, gate, up, down, activate=nn.functional.silu):
    return linear(activate(linear(x, gate)) * linear(x, up), down)


def tanh_gelu(x):
    return nn.functional.gelu(x, approximate="tanh")


def other_way_round(x, gate, up, down):
    return linear(linear(x, up) * nn.functional.silu(linear(x, gate)), down)


def input_activated_in_place(x, gate, up, down):
    hidden = linear(x, gate)
    product = linear(hidden, down)
    total = nn.functional.silu(hidden, inplace=True).sum()
    return x + product + total


def input_activated_in_place_by_position(x, gate, up, down):
    hidden = linear(x, gate)
    product = linear(hidden, down)
    total = nn.functional.relu(hidden, True).sum()
    return x + product + total


def gate_read_twice(x, gate, up, down):
    g = linear(x, gate)
    return linear(nn.functional.silu(g) * linear(x, up), down) + g.sum()


def unit_read_twice(x, gate, up, down):
    unit = nn.functional.silu(linear(x, gate)) * linear(x, up)
    return linear(unit, down) + unit.sum()


def twice_activated(x, gate, up, down):
    return linear(nn.functional.silu(linear(x, gate)) * nn.functional.silu(linear(x, up)), down)


def result_read_twice(x, gate, up, down):
    out = mlp(x, gate, up, down)
    return x + out + out.sum()


MLPS = {
    "swiglu": (mlp, (1, 0, 0)),
    "geglu": (lambda *given: mlp(*given, activate=tanh_gelu), (1, 0, 0)),
    "up first": (other_way_round, (1, 0, 0)),
    "residual": (lambda x, *weights: x + mlp(x, *weights), (1, 1, 0)),
    "residual behind": (lambda x, *weights: mlp(x, *weights) + x, (1, 1, 0)),
    "residual broadcast": (lambda x, *weights: mlp(x, *weights) + x[:1], (1, 0, 0)),
    "residual scaled": (lambda x, *weights: torch.add(x, mlp(x, *weights), alpha=2), (1, 0, 0)),
    "residual of another type": (lambda x, *weights: x.double() + mlp(x, *weights), (1, 0, 0)),
    "doubled": (lambda *given: (out := mlp(*given)) + out, (1, 0, 0)),
    "result read twice": (result_read_twice, (1, 0, 0)),
    "erf gelu": (lambda *given: mlp(*given, activate=nn.functional.gelu), (0, 0, 0)),
    "relu": (lambda *given: mlp(*given, activate=torch.relu), (0, 0, 0)),
    "gate read twice": (gate_read_twice, (0, 0, 0)),
    "unit read twice": (unit_read_twice, (0, 0, 0)),
    "another input": (lambda x, g, u, d: linear(nn.functional.silu(linear(x, g)) * linear(x + 1, u), d), (0, 0, 0)),
    "bias": (lambda x, g, u, d: linear(nn.functional.silu(linear(x, g, g[:, 0])) * linear(x, u), d), (0, 0, 0)),
    "bias of down": (
        lambda x, g, u, d: x + linear(nn.functional.silu(linear(x, g)) * linear(x, u), d, d[:, 0]),
        (0, 0, 0),
    ),
    "broadcast up": (lambda x, g, u, d: linear(nn.functional.silu(linear(x, g)) * linear(x, u[:1]), d), (0, 0, 0)),
    "twice activated": (twice_activated, (0, 0, 0)),
    "plain": (lambda x, g, u, d: x + linear(linear(x, g), d), (0, 0, 1)),
    "written into": (lambda x, *weights: mlp(x, *weights).add_(x), (0, 0, 0)),
    "input activated in place": (input_activated_in_place, (0, 0, 0)),
    "input activated in place by position": (input_activated_in_place_by_position, (0, 0, 0)),
    "activated in place": (
        lambda *given: mlp(*given, activate=lambda g: nn.functional.silu(g, inplace=True)),
        (0, 0, 0),
    ),
}


@pytest.mark.parametrize(("function", "expected"), MLPS.values(), ids=MLPS)
@pytest.mark.usefixtures("nothing_compiled")
def test_gated_mlps_are_told_from_others(function, expected, monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    generator = torch.Generator().manual_seed(0)
    # (Of whole numbers: products of gate and up have no rounding that hangs on how they are computed.)
    given = [torch.randint(-3, 4, shape, generator=generator).float() for shape in ((5, 8), (12, 8), (12, 8), (8, 12))]
    look, counts = fusing(counted)
    torch.testing.assert_close(torch.compile(function, backend=look)(*given), function(*given))
    assert counts == [expected]


@pytest.mark.usefixtures("nothing_compiled")
def test_products_that_no_kernel_serves_stay():
    look, counts = fusing(counted)
    x, gate, up, down = (torch.randn(shape) for shape in ((5, 8), (16, 8), (16, 8), (8, 16)))
    torch.compile(lambda *given: x + mlp(*given), backend=look)(x, gate, up, down)
    assert counts == [(0, 0, 0)]


def by_keywords(x, gate, up, down):
    g = nn.functional.silu(input=linear(input=x, weight=gate))
    h = torch.add(input=x, other=linear(g * linear(x, up), down))
    halves = torch.cat(tensors=(h, h), dim=-1)
    turned = torch.cat((torch.neg(input=h[..., 4:]), h[..., :4]), -1) * halves[..., :8]
    mean = torch.mean(input=h.pow(2), dim=-1, keepdim=True)
    return (
        torch.cat(halves.split(8, -1), -1)[..., :8] * torch.rsqrt(input=h.abs() + 1) * torch.rsqrt(mean + 1e-6) + turned
    )


@pytest.mark.usefixtures("nothing_compiled")
def test_what_is_given_by_keyword_is_left_alone(monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    given = [torch.randn(shape) for shape in ((5, 8), (12, 8), (12, 8), (8, 12))]
    look, _ = fusing(counted)
    with torch._dynamo.config.patch(specialize_float=True):
        torch.testing.assert_close(
            torch.compile(by_keywords, backend=look, fullgraph=True)(*given), by_keywords(*given)
        )
