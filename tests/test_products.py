"""Products that compute what stands behind them: autograd's numbers and gradients, weights that stay the model's own."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from families import exact_model
from torch import nn
from transformers import AutoModelForCausalLM

import preftree
from preftree.models import compiled, products, products_formulas
from preftree.models.products import side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(products, "serves", lambda *operands: True)


def stock(x, gate, up, down, residual, activation):
    activate = nn.functional.silu if activation == "swiglu" else lambda g: nn.functional.gelu(g, approximate="tanh")
    out = nn.functional.linear(activate(nn.functional.linear(x, gate)) * nn.functional.linear(x, up), down)
    return out if residual is None else residual + out


def random(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def compare(run, other, given, trained):
    """Values, and gradients of those that are trained."""
    given = [None if x is None else x.requires_grad_(place in trained) for place, x in enumerate(given)]
    wanted = [given[place] for place in trained]
    results = []
    for function in (run, other):
        out = function(*given)
        factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad((out * factors).sum(), wanted)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("activation", products.ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("trained", [[0, 1, 2, 3], [0], [0, 2], [1], [3], [1, 2, 3]])
def test_gated_mlp(activation, residual, trained):
    given = random(0, (2, 5, 7), (11, 7), (11, 7), (7, 11), (2, 5, 7))
    given, trained = (given, [*trained, 4]) if residual else ([*given[:4], None], trained)

    def run(*given):
        return torch.ops.preftree.gated_mlp(*given, activation)

    compare(run, lambda *given: stock(*given, activation), given, trained)
    with torch.no_grad():
        assert torch.equal(run(*given), run(*(None if x is None else x.detach() for x in given)))
        torch.testing.assert_close(run(*given), stock(*given, activation))


@pytest.mark.parametrize("trained", [[0, 1, 2], [0], [1], [2]])
def test_linear_onto(trained):
    given = random(1, (3, 5, 7), (4, 7), (3, 5, 4))
    compare(torch.ops.preftree.linear_onto, lambda x, w, r: r + nn.functional.linear(x, w), given, trained)


@pytest.mark.parametrize("grad", [False, True])
def test_gate_and_up_are_kept_for_a_gradient_only(grad, monkeypatch):
    kept = []
    by_formulas = products_formulas.up
    monkeypatch.setattr(products_formulas, "up", lambda *given: kept.append(given[-1]) or by_formulas(*given))
    x, gate, up, down = (given.requires_grad_(grad) for given in random(2, (3, 4), (6, 4), (6, 4), (4, 6)))
    torch.ops.preftree.gated_mlp(x, gate, up, down, None, "swiglu")
    with torch.no_grad():
        torch.ops.preftree.gated_mlp(x.requires_grad_(), gate, up, down, None, "swiglu")
    assert kept == [grad, False]


@pytest.mark.parametrize("activation", products.ACTIVATIONS)
def test_operators_keep_their_contracts(activation):
    x, gate, up, down, residual = random(3, (3, 4), (6, 4), (6, 4), (4, 6), (3, 4))
    grads, both = random(4, (3, 12), (3, 12))
    for operator, given in (
        (products._up, (x, gate, up, activation, True)),
        (products._up, (x, gate, up, activation, False)),
        (products._up_backward, (x, down, both, activation)),
        (products._input_gradient, (grads, gate, up)),
        (products._weight_gradients, (grads, x, [gate, up])),
        (products.weight_gradient, (grads, x, [gate, up])),
        (products._onto, (both[:, :6], down, residual)),
    ):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("served")
def test_weights_lie_side_by_side(tmp_path):
    model = exact_model("llama")
    before = copy.deepcopy(model.state_dict())
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    logits = model(tokens).logits
    assert side_by_side(model) == 6 * model.config.num_hidden_layers  # the output's projection takes as many inputs
    assert side_by_side(model) == 0
    for layer in model.model.layers:
        attention = layer.self_attn
        for linears in (
            (layer.mlp.gate_proj, layer.mlp.up_proj),
            (attention.q_proj, attention.k_proj, attention.v_proj),
        ):
            weights = [linear.weight for linear in linears]
            together = products._as_one(*weights)
            assert together.data_ptr() == weights[0].data_ptr()
            assert torch.equal(together, torch.cat(weights))
    assert torch.equal(model(tokens).logits, logits)

    # What others do with parameters works as before.
    assert all(torch.equal(given, before[name]) for name, given in model.state_dict().items())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    twin = exact_model("llama")
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for each, steps in ((model, optimizer), (twin, theirs)):
        each(tokens, labels=tokens).loss.backward()
        steps.step()
        steps.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(parameter.nbytes for parameter in model.parameters())
    model.load_state_dict(before)
    assert torch.equal(model(tokens).logits, logits)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, logits)


def mlp_of(*shapes, **options):
    module = nn.Module()
    for place, (inputs, outputs) in enumerate(shapes):
        setattr(module, f"linear{place}", nn.Linear(inputs, outputs, bias=False, **options))
    return module


@pytest.mark.usefixtures("served")
def test_other_weights_stay_where_they_are():
    tied = mlp_of((8, 16), (8, 16), (16, 8))
    tied.linear1.weight = tied.linear0.weight
    parts = mlp_of((8, 16), (8, 16), (16, 8))
    parts.linear0.weight.data = torch.randn(20, 8)[2:18]
    biased = mlp_of((8, 16), (8, 16), (16, 8))
    biased.linear1 = nn.Linear(8, 16)
    others = mlp_of((8, 16), (8, 16))
    others.linear1.weight.data = torch.randn(16, 8, dtype=torch.float64)
    for module in (tied, parts, biased, others, mlp_of((8, 16), (16, 8)), mlp_of((8, 16), (16, 8), (8, 16))):
        where = [parameter.data_ptr() for parameter in module.parameters()]
        assert side_by_side(module) == 0
        assert [parameter.data_ptr() for parameter in module.parameters()] == where


def test_nothing_is_moved_that_no_kernel_serves():
    assert side_by_side(exact_model("llama")) == 0


@pytest.mark.usefixtures("served")
def test_each_run_of_linears_lies_together():
    module = mlp_of((8, 16), (8, 8), (8, 3), (16, 8), (8, 4), (8, 4))
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    assert side_by_side(module) == 5
    assert all(map(torch.equal, module.parameters(), weights))
    storages = [parameter.untyped_storage().data_ptr() for parameter in module.parameters()]
    assert len(set(storages)) == 3
    assert storages[0] == storages[2]
    assert storages[4] == storages[5]


@pytest.mark.parametrize(
    "case", ["apart", "other way round", "with a gap", "transposed", "the last apart", "others behind"]
)
def test_weights_that_lie_apart_are_put_together(case):
    memory = torch.randn(40, 6)
    bytes_of = memory.numpy().tobytes()
    # Tensors of their own whose memory lies behind each other all the same.
    others = (torch.frombuffer(bytes_of, dtype=torch.float32, count=48, offset=192 * i).view(8, 6) for i in range(2))
    weights = {
        "apart": (torch.randn(8, 6), torch.randn(8, 6)),
        "other way round": (memory[8:16], memory[:8]),
        "with a gap": (memory[:8], memory[9:17]),
        "transposed": (memory.flatten()[:48].view(6, 8).T, memory.flatten()[48:96].view(6, 8).T),
        "the last apart": (memory[:8], memory[8:16], torch.randn(3, 6)),
        "others behind": tuple(others),
    }[case]
    assert torch.equal(products._as_one(*weights), torch.cat(weights))


@pytest.fixture
def on_this_device(monkeypatch):
    products._work.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield lambda kernels: monkeypatch.setattr(products, "kernels_of", lambda name: kernels)
    products._work.cache_clear()


def kernels_with(**others):
    names = ("up", "up_backward", "input_gradient", "weight_gradients", "onto")
    formulas = {name: getattr(products_formulas, name) for name in names}
    return SimpleNamespace(**({"refusal": lambda capability: None} | formulas | others))


def test_kernels_are_tried(on_this_device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_this_device(kernels_with())
        assert products._work(CPU, torch.float32)
        on_this_device(None)
        assert not products._work(CPU, torch.float64)
        on_this_device(kernels_with(refusal=lambda capability: "another card"))
        assert not products._work(CPU, torch.bfloat16)


def fails(*given):
    raise RuntimeError("no such tile")


@pytest.mark.parametrize("name", ["up", "up_backward", "input_gradient", "weight_gradients", "onto"])
def test_kernels_that_do_not_work_are_not_used(name, on_this_device):
    def wrong(*given):
        result = getattr(products_formulas, name)(*given)
        return tuple(-each for each in result) if isinstance(result, tuple) else 1.1 * result

    on_this_device(kernels_with(**{name: fails}))
    with pytest.warns(UserWarning, match="quack-kernels do not work here.*RuntimeError: no such tile"):
        assert not products._work(CPU, torch.float32)
    products._work.cache_clear()
    on_this_device(kernels_with(**{name: wrong}))
    with pytest.warns(UserWarning, match=r"quack-kernels do not work here.*relative error is (0\.1|2)"):
        assert not products._work(CPU, torch.float32)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2"])
@pytest.mark.usefixtures("served", "nothing_compiled")
def test_compiled_layers_are_exact(name, monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    model, plain = exact_model(name), preftree.prepare_model(exact_model(name))
    assert side_by_side(copy.deepcopy(model)) >= 2 * model.config.num_hidden_layers
    preftree.prepare_model(model, compile=True)
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3, 4], [1, 2, 5, 6, 7]], [2, 2])] * 2)[0]
    results = []
    for each in (model, plain):
        logps = preftree.sequence_logps(each, row).logps
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        results.append([logps, *(parameter.grad for parameter in each.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_rows(monkeypatch):
    """A function that sums gradients over two rows, and how many products have been asked to add to what is there."""
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    found, so_far = [], products.so_far
    monkeypatch.setattr(products, "so_far", lambda weights: found.append(so_far(weights)) or found[-1])
    trees = [
        preftree.TokenTree.from_sequences(pair, [2, 2]) for pair in ([[1, 2, 3, 4], [1, 2, 5]], [[6, 7, 8], [6, 7]])
    ]
    rows = [preftree.pack([tree])[0] for tree in trees]

    def run(model, on):
        with products.adding_to_gradients(on):
            for row in rows:
                preftree.sequence_logps(model, row).logps.square().sum().backward()
        added = sum(each is not None for each in found)
        found.clear()
        return added, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    return run


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.usefixtures("served", "nothing_compiled")
def test_products_add_to_gradients(name, two_rows):
    """Once a layer and product of what is trained: gate and up, the MLP's output, and attention's."""
    model = preftree.prepare_model(exact_model(name), compile=True)
    none, expected = two_rows(model, False)
    model.zero_grad()
    added, grads = two_rows(model, True)
    assert none == 0
    assert added >= 2 * model.config.get_text_config().num_hidden_layers
    # As they lie, what is in `.grad` from the start counts as well.
    twice_added, twice = two_rows(model, True)
    assert twice_added == 2 * added
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(twice[key], 2 * expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("served", "nothing_compiled")
def test_gradients_that_somebody_watches_are_left_alone(two_rows):
    model = preftree.prepare_model(exact_model("qwen3"), compile=True)
    _, expected = two_rows(model, False)
    model.zero_grad()
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    seen: list[list[torch.Tensor]] = [[] for _ in weights]
    hooks = [weight.register_hook(given.append) for weight, given in zip(weights, seen, strict=True)]
    watched, grads = two_rows(model, True)
    for hook in hooks:
        hook.remove()
    for weight, given in zip(weights, seen, strict=True):
        torch.testing.assert_close(sum(given), weight.grad)
    model.zero_grad()
    assert watched == two_rows(model, True)[0] - len(weights)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-6)


def test_gradients_of_another_kind_are_left_alone():
    """Elsewhere in memory, of another type, of weights that are no leaves or not trained; none outside."""
    memory = torch.zeros(9, 3)
    one, two = (nn.Parameter(torch.zeros(size, 3)) for size in (2, 3))
    with products.adding_to_gradients(True):
        assert products.so_far([one, two]) is None
        one.grad, two.grad, _ = memory.split([2, 3, 4])
        assert products.so_far([two, one]) is None
        with warnings.catch_warnings(action="error"):  # PyTorch warns of who asks others for gradients
            assert products.so_far([one, two.clone()]) is None
        one.requires_grad_(False)
        assert products.so_far([one, two]) is None
        one.requires_grad_()
        assert one.grad is not None
        assert two.grad is not None
        with products.adding_to_gradients(False):
            assert products.so_far([one, two]) is None
        taken = products.so_far([one, two])
        assert taken.data_ptr() == memory.data_ptr()
        assert taken.shape == (5, 3)
        assert one.grad is None
        assert two.grad is None
        two.grad = torch.zeros(3, 3)
        assert products.so_far([one, two]) is None
        two.grad = torch.zeros(3, 3).to_sparse()
        assert products.so_far([two]) is None
    two.grad = torch.zeros(3, 3)
    assert products.so_far([two]) is None
