"""Compiled layers: the numbers of the layers as they are, one compilation for all layers and lengths, only for rows."""

import copy
import gc
from functools import partial

import pytest
import torch
import transformers
from families import VOCABULARY, build, exact_model
from oracle import random_sequences
from packaging.version import Version
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import preftree
from preftree.attention import Rule, Scores, TreeAttention
from preftree.models import compiled, interface, operator, products
from preftree.models.compiled import compile_layers
from preftree.models.prepared import prepared_part

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture
def captured(monkeypatch):
    """Graphs run as they were captured: what is compiled when does not depend on the compiler behind."""
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")


# Layers that attend and do not, that do not at all, that attend by their own code, that hand on what they selected.
ALONG = ["lfm2", "mamba", "bloom", "glm_moe_dsa", "nemotron_h"]


def graphs():
    return counters["stats"]["unique_graphs"]


def row_of(seed, spare=0):
    trees = [
        preftree.TokenTree.from_sequences(*group)
        for group in random_sequences(torch.Generator().manual_seed(seed), VOCABULARY)
    ]
    return preftree.pack(trees, sum(len(tree) for tree in trees) + spare)[0]


ROWS = [row_of(1), row_of(2, 3), row_of(3, 7), row_of(4)]


def numbers(model, row):
    """Log-probabilities and every gradient of an uneven sum of them."""
    model.zero_grad()
    out = preftree.sequence_logps(model, row)
    gc.collect()  # what the backward pass needs is kept by the graph
    (out.logps * torch.arange(1, len(out.logps) + 1)).sum().backward()
    return [out.logps.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def close(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_same_numbers_by_compiled_code():
    model = preftree.prepare_model(exact_model("qwen3")).train()
    expected = [numbers(model, row) for row in ROWS]
    compile_layers(model)
    for row, own in zip(ROWS, expected, strict=True):
        close(numbers(model, row), own)
    assert graphs() > 0


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2", "deepseek_v3", "gpt_oss", "olmo2", *ALONG])
@pytest.mark.filterwarnings("ignore:.* run along each path")
def test_one_compilation_for_all_lengths(name):
    """Gemma 3 has two kinds of layers, the mixtures of experts parts that cannot be compiled, others parts along paths."""
    model = preftree.prepare_model(exact_model(name)).train()
    expected = [numbers(model, row) for row in ROWS]
    assert compile_layers(model) == 3
    assert compile_layers(model) == 3
    # (With transformers 5.17 some layers with experts are cut into parts when they run a second time.)
    settled = 2 if name in ("deepseek_v3", "nemotron_h") and Version(transformers.__version__) < Version("5.18") else 1
    for row, own in zip(ROWS[:settled], expected, strict=False):
        close(numbers(model, row), own)
    compilations = graphs()
    assert compilations > 0
    assert len({len(row) for row in ROWS}) == len(ROWS)
    for row, own in zip(ROWS[settled:], expected[settled:], strict=True):
        close(numbers(model, row), own)
    assert graphs() == compilations


@pytest.mark.usefixtures("captured")
def test_more_layers_take_no_more_compilations():
    counts = []
    for layers in (3, 6):
        torch._dynamo.reset()
        counters.clear()
        model = preftree.prepare_model(build("Llama", {"num_hidden_layers": layers}), compile=True)
        numbers(model, ROWS[0])
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


@pytest.mark.usefixtures("group_of_one")
def test_sizes_are_known_where_weights_are_shared_out(monkeypatch):
    """Layers that FSDP2 shares out are compiled for their sizes, as others are: only what changes with a row is a symbol."""
    symbols = []

    def capture(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        symbols.append(sum(isinstance(value, torch.SymInt) for value in values))
        return graph.forward

    monkeypatch.setattr(compiled, "_BACKEND", capture)
    numbers(preftree.prepare_model(exact_model("llama"), compile=True).train(), ROWS[0])
    alone = symbols.copy()
    assert len(alone) == 3
    assert alone[0] == 2  # the row's length and its number
    symbols.clear()
    torch._dynamo.reset()
    model = preftree.prepare_model(exact_model("llama"), compile=True).train()
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    numbers(model, ROWS[0])
    assert symbols == alone


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_around_the_compiled_code(reentrant, monkeypatch):
    """Each compiled part runs a second time for the backward pass, and nothing runs uncompiled instead."""
    ran = []

    def counting(graph, inputs):
        return lambda *values: (ran.append(graph), graph(*values))[1]

    monkeypatch.setattr(compiled, "_BACKEND", counting)
    model = preftree.prepare_model(exact_model("llama")).train()
    expected = numbers(model, ROWS[0])
    compile_layers(model)
    close(numbers(model, ROWS[0]), expected)
    once = len(ran)
    assert once > 0
    ran.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    close(numbers(model, ROWS[0]), expected)
    # With reentrant checkpointing the last layer is computed whole; else its keys are made outside, once, or by transformers
    # that checkpoint around a layer's hooks within, twice.
    outside = LlamaDecoderLayer.forward.__code__.co_name == compiled._WRAPPER
    assert once == 4
    assert len(ran) == 2 * 3 + (0 if reentrant else 1 if outside else 2)


@pytest.mark.usefixtures("captured")
def test_checkpointing_around_the_hooks_of_the_last_layer(monkeypatch):
    """As transformers 5.17 has it: the layer is cut to its tokens a second time, and the checkpoint compares what is saved."""
    model, row = preftree.prepare_model(exact_model("llama")).train(), ROWS[0]
    expected = numbers(model, row)
    compile_layers(model)
    last = model.model.layers[-1]

    def call(layer, *args, **kwargs):
        again = partial(torch.nn.Module.__call__, layer, **kwargs)
        return checkpoint(again, *args, use_reentrant=False) if layer is last else again(*args)

    monkeypatch.setattr(type(last), "__call__", call)
    close(numbers(model, row), expected)


def test_less_is_kept_on_a_budget(monkeypatch):
    monkeypatch.setattr(compiled, "_BACKEND", "aot_eager_decomp_partition")
    monkeypatch.setattr(products, "serves", lambda *operands: True)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "num_hidden_layers": 4}
    row, kept, attended, results = ROWS[0], [], [], []
    attend = interface.RowMask.forward
    monkeypatch.setattr(interface.RowMask, "forward", lambda *given: attended.append(1) or attend(*given))
    for budget in (1, 0.6, 0):
        torch._dynamo.reset()
        model = preftree.prepare_model(build("Qwen3", sizes), compile=True, activation_memory_budget=budget).train()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        found = {}

        def pack(tensor, found=found, weights=weights):
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in weights:
                found[memory.data_ptr()] = memory.nbytes()
            return tensor

        attended.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(numbers(model, row))
        kept.append((sum(found.values()), len(attended)))
    for one in results[1:]:
        close(one, results[0])
    # Attention takes more than others to compute again, and comes last.
    (most, once), (less, still_once), (least, again) = kept
    assert most > 1.2 * less
    assert less > 1.2 * least
    assert once == still_once == 4
    assert again > 4


def test_operators_say_what_they_cost():
    """In operations, which is what the partitioner weighs against memory."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, gate, up, down = (torch.empty(*shape) for shape in ((7, 4), (6, 4), (6, 4), (4, 6)))
        hidden, _ = torch.ops.preftree.gated_up(x, gate, up, "swiglu", True)
        assert counter.get_total_flops() == 2 * 2 * 7 * 4 * 6
        torch.ops.preftree.product_onto(hidden, down, x)
        assert counter.get_total_flops() == 3 * 2 * 7 * 4 * 6
        q, k, v = (torch.empty(1, heads, 9, size) for heads, size in ((4, 8), (2, 8), (2, 6)))
        torch.ops.preftree.row_attention(q, k, v, None, None, torch.empty(()), 1.0, None, "0")
        # Scores of half of all pairs, and sums of their values.
        assert counter.get_total_flops() == 3 * 2 * 7 * 4 * 6 + 4 * 9 * 9 * (8 + 6)


def test_budgets_are_checked():
    for budget in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"activation_memory_budget must be between 0 and 1, got {budget}"):
            preftree.prepare_model(exact_model("llama"), compile=True, activation_memory_budget=budget)
    common = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        preftree.DPOConfig(activation_memory_budget=2, **common)
    with pytest.raises(ValueError, match=r"activation_memory_budget=0\.5 is about compiled layers"):
        preftree.DPOConfig(activation_memory_budget=0.5, compile_layers=False, **common)
    assert preftree.DPOConfig(activation_memory_budget=0.5, **common).compiles_layers is True
    assert not dict(preftree.DPOConfig(activation_memory_budget=0.5, **common).unused_options())
    common["gradient_checkpointing"] = True
    unused = dict(preftree.DPOConfig(activation_memory_budget=0.5, **common).unused_options())
    assert "computes whole layers again" in unused["activation_memory_budget"]


def test_ordinary_batches_and_generation_are_not_compiled():
    model = exact_model("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    preftree.prepare_model(model, compile=True)
    torch.testing.assert_close(model(ids).logits, expected[0])
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected[1])
    assert graphs() == 0


@pytest.mark.usefixtures("captured")
def test_classes_keep_their_names_and_copies_run_their_own_weights():
    model = preftree.prepare_model(exact_model("llama"), compile=True)
    layer = model.model.layers[0]
    assert type(layer).__name__ == "LlamaDecoderLayer"
    assert isinstance(layer, type(exact_model("llama").model.layers[0]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    halved = preftree.prepare_model(exact_model("llama"))
    halved.load_state_dict(other.state_dict())
    close(numbers(other, ROWS[1]), numbers(halved, ROWS[1]))


def test_layers_that_do_not_compile_run_as_they_are(monkeypatch):
    """Only where nobody has asked for compilation by name."""

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "_BACKEND", broken)
    model = preftree.prepare_model(exact_model("llama")).train()
    expected = numbers(model, ROWS[0])
    asked = copy.deepcopy(model)
    assert compile_layers(model, or_stock=True) == 3
    with pytest.warns(UserWarning, match="(?s)LlamaDecoderLayer does not compile.*no compiler here"):
        close(numbers(model, ROWS[0]), expected)
    compile_layers(asked)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no compiler here"):
        numbers(asked, ROWS[0])


@pytest.mark.parametrize(("device", "compiles"), [(None, False), ("cuda", True)])
def test_unasked_layers_are_compiled_for_a_gpu(monkeypatch, device, compiles):
    """Also while the weights are on the CPU still, as those are that will be sharded."""
    monkeypatch.setattr("preftree.models.compiled.has_triton", lambda: True)
    model = exact_model("llama")
    preftree.prepare_model(model, compile=None, device=device)
    assert hasattr(model.model.layers[0], "runs_rows_compiled") == compiles


def test_a_backend_is_chosen_for_where_rows_will_run(monkeypatch):
    """And the model is tried where its weights are, by another one."""
    monkeypatch.setattr("preftree.models.prepare.check_backend", lambda name, device: asked.append((name, device.type)))
    asked = []
    model = preftree.prepare_model(exact_model("llama"), backend="flash", device="cuda")
    assert asked == [("flash", "cuda")]
    assert prepared_part(model).backend == "flash"


def operands(row, heads=4, groups=2, size=8):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    length = len(row)
    tensors = draw(1, heads, length, size), draw(1, groups, length, size), draw(1, groups, length, size)
    return tensors, draw(heads), draw(1, heads, length, length)


def mask_of(row):
    rule = Rule(lambda b, h, q, k: (k <= q) & (k > q - 5), window=5)
    with interface.activate(row, "dense") as active:
        return interface.RowMask(active, TreeAttention(row, rule, "dense"))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "sinks-and-bias"])
def test_operator(plain):
    """As attention by itself, gradients too, and by PyTorch's own checks of an operator."""
    row = row_of(5)
    mask = mask_of(row)
    tensors, sinks, bias = operands(row)
    sinks, bias = (None, None) if plain else (sinks, bias)
    given = [*tensors, *([] if plain else [sinks, bias])]
    arguments = (*tensors, sinks, bias, mask.handle, 0.3, 2.0, "Layer")
    torch.library.opcheck(operator.row_attention, arguments)
    expected = mask.attend(*tensors, Scores(0.3, 2.0, sinks, bias))
    out = operator.row_attention(*arguments)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad(out, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_row_that_is_gone():
    row = row_of(5)
    tensors, *_ = operands(row)
    mask = mask_of(row)
    arguments = (*tensors, None, None, mask.handle, 0.3, None, "Layer")
    out = operator.row_attention(*arguments)
    del mask
    gc.collect()
    with pytest.raises(RuntimeError, match="row of this backward pass is gone"):
        out.sum().backward()
