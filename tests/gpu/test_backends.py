"""Backends on a GPU against the dense specification in float64: outputs and every gradient, odd shapes."""

import pytest
import torch

import preftree
from preftree.attention import (
    BACKENDS,
    Layer,
    Scores,
    TreeAttention,
    choose_backend,
    flash,
    flash_parts,
    varlen_kernels,
)
from preftree.attention.blocks import key_lists, nodes_of, query_lists, two_runs
from preftree.attention.copying import copy_to_paths
from preftree.attention.mask import CAUSAL, Rule, chunks, sliding_window
from preftree.attention.paths import plan_paths
from preftree.attention.trial import kind_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What FlexAttention says when it is not compiled, as after too many compilations.
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),
    # What trials say of kernels that go wrong.
    pytest.mark.filterwarnings("error:preftree's masks do not fit"),
    pytest.mark.filterwarnings("error:the installed flash-attn-4 does not compute"),
]

# A rule known by its function alone.
OTHER = Rule(lambda b, h, q, k: (k <= q) & ((k > q - 50) | (k % 7 == 0)))
RULES = {
    "causal": CAUSAL,
    "window": sliding_window(50),
    "wide": sliding_window(400),
    "chunk": chunks(64),
    "other": OTHER,
}


def long_row(length, seed=0, deep=False):
    """A row of trees with runs of up to a few hundred tokens, padded to ``length``.

    What a query sees are two runs of keys, or if ``deep`` sometimes more.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def draw(size):
        return torch.randint(0, 9, (size,), generator=generator).tolist()

    trees, used = [], 0
    while True:
        prompt = draw(integer(5, min(length // 3, 300)))
        members = [[*prompt, 10 + branch, *draw(integer(3, min(length // 5, 200)))] for branch in range(integer(1, 5))]
        members += [[*members[0], 20, *draw(9)], [*members[0], 21, *draw(7)]]
        if deep:
            members += [[*prompt, 30, *draw(5), 40 + branch, *draw(integer(1, 40))] for branch in range(3)]
        tree = preftree.TokenTree.from_sequences(members, [len(prompt)] * len(members))
        if used + len(tree) > length - 3:
            if trees:
                return preftree.pack(trees, length)[0].to("cuda")
        else:
            trees.append(tree)
            used += len(tree)


def unshared_row(length):
    """Sequences alone, padded to ``length``: what nothing is to be copied for."""
    sequences = [[i] * size for i, size in enumerate((length // 2, 1, length // 3, 60))]
    return preftree.pack([preftree.TokenTree.from_sequences([s], [1]) for s in sequences], length)[0].to("cuda")


# name: query heads, key-value heads, head size, value size, further features
SHAPES = {
    "128": (8, 2, 128, 128),
    "64-mha": (4, 4, 64, 64),
    "96": (4, 2, 96, 96),
    "256": (4, 1, 256, 256),
    "mla": (4, 4, 192, 128),
    "three-groups": (6, 2, 64, 64),
    "24-heads": (24, 8, 128, 128),
    "5-heads": (5, 5, 96, 96),
    "small-values": (4, 4, 64, 32),
    **{str(size): (4, 2, size, size) for size in (8, 16, 24, 32, 40, 48, 80, 112, 160, 224)},
}
CASES = [
    *[("flash", shape, "causal", "") for shape in SHAPES],
    *[("flash", shape, "window", "") for shape in ("64-mha", "96", "128", "mla")],
    ("flash", "128", "chunk", ""),
    ("flash", "128", "window", "sinks"),
    ("flash", "128", "causal", "softcap"),
    ("flash", "256", "window", "sinks"),
    ("flash", "128", "causal", "fp16"),
    *[("varlen", shape, "causal", "") for shape in SHAPES],
    ("varlen", "128", "window", ""),
    ("varlen", "128", "window", "sinks"),
    ("varlen", "128", "causal", "softcap"),
    ("varlen-torch", "128", "causal", ""),
    ("varlen-torch", "64-mha", "window", ""),
    *[(backend, "128", rule, "alone") for backend in ("varlen", "varlen-torch") for rule in ("causal", "window")],
    ("flash", "128", "causal", "alone"),
    *[("flash", "128", rule, "by-entry") for rule in ("causal", "window")],
    *[("flash", shape, "causal", "by-entry") for shape in ("8", "16", "24", "32", "48", "64-mha", "112", "256")],
    *[("flash", shape, rule, "deep") for shape in ("64-mha", "128", "256") for rule in ("causal", "window")],
    ("varlen-torch", "256", "causal", "fp16"),
    *[("flex", shape, "causal", "") for shape in ("128", "three-groups", "small-values", "mla")],
    *[("flex", "128", rule, "") for rule in ("window", "chunk", "other")],
    ("flex", "128", "window", "sinks"),
    ("flex", "128", "causal", "softcap"),
    ("flex", "128", "causal", "fp32"),
]


@pytest.mark.parametrize(
    ("backend", "shape", "rule", "special"), CASES, ids=["_".join(filter(None, case)) for case in CASES]
)
def test_backend_agrees_with_dense(backend, shape, rule, special, monkeypatch):
    """No farther from float64 than dense attention in the same type is, within a factor; refused where documented."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(special, torch.bfloat16)
    if backend == "varlen-torch":
        backend = "varlen"
        monkeypatch.setattr(varlen_kernels, "fa4_refusal", lambda layer: "not wanted here")
    if special == "by-entry":
        monkeypatch.setattr(flash, "_takes_bits", lambda *kind: False)
    heads, groups, size, value_size = SHAPES[shape]
    for length in (130, 1111):
        row = unshared_row(length) if special == "alone" else long_row(length, deep=special == "deep")
        assert (two_runs(row, RULES["causal"]) is None) == (special == "deep")
        generator = torch.Generator("cuda").manual_seed(0)
        torch.full((1 << 24,), float("nan"), device="cuda")  # what memory holds that nobody writes to

        def draw(*shape, generator=generator):
            return torch.randn(shape, generator=generator, device="cuda")

        q, k, v = draw(1, length, heads, size), draw(1, length, groups, size), draw(1, length, groups, value_size)
        sinks = draw(heads) if special == "sinks" else None
        weight = draw(1, heads, length, value_size)
        weight[:, :, row.num_tokens :] = 0
        softcap = 2.0 if special == "softcap" else None
        layer = Layer(
            "cuda", torch.cuda.get_device_capability(), dtype, heads, groups, size, value_size, RULES[rule],
            softcap is not None, sinks is not None,
        )  # fmt: skip
        if (reason := BACKENDS[backend].refusal(layer)) is not None:
            pytest.skip(reason)
        if backend == "varlen" and shape not in ("small-values", "mla"):
            assert varlen_kernels.choose(layer) is not None

        def run(backend, dtype, row=row, tensors=(q, k, v), sinks=sinks, weight=weight, low=dtype, softcap=softcap):
            inputs = [x.to(low).to(dtype).transpose(1, 2).detach().requires_grad_() for x in tensors]
            sink = None if sinks is None else sinks.to(low).to(dtype).requires_grad_()
            scores = Scores(tensors[0].shape[-1] ** -0.5, softcap, sink)
            out = BACKENDS[backend].bind(row, RULES[rule])(*inputs, scores)
            (out * weight.to(dtype)).sum().backward()
            grads = [x.grad for x in inputs] + ([] if sink is None else [sink.grad])
            return [x.double() for x in (out[:, :, : row.num_tokens], *grads)]

        exact, dense, other = run("dense", torch.float64), run("dense", dtype), run(backend, dtype)
        for name, truth, by_dense, found in zip(("out", "dq", "dk", "dv", "dsinks"), exact, dense, other, strict=False):
            error, allowed = (found - truth).norm(), (by_dense - truth).norm()
            assert error <= 2 * allowed + 1e-3 * truth.norm(), (name, length, float(error), float(allowed))


def test_tree_kernels_are_made_of_parts_of_our_own():
    """A release that they do not fit runs on with the library's, slower: the one that is installed here is to take them."""
    row = long_row(300)
    q = torch.randn(1, 300, 2, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    if (reason := BACKENDS["flash"].refusal(Layer.of(q, q, q, CAUSAL, Scores(1.0)))) is not None:
        pytest.skip(reason)
    found = [(module.__name__.rpartition(".")[2], name) for module, name, _ in flash_parts.parts()]
    assert found == [
        ("flash_bwd_sm90", "SingleTileScheduler"),
        ("flash_fwd_sm90", "AttentionMask"),
        ("flash_bwd_sm90", "AttentionMask"),
    ]
    assert flash._takes_bits(kind_of(Layer.of(q, q, q, CAUSAL, Scores(1.0))), q.device)
    before = [getattr(module, name) for module, name, _ in flash_parts.parts()]
    TreeAttention(row, CAUSAL, "flash")(q, q, q, Scores(1.0))
    assert [getattr(module, name) for module, name, _ in flash_parts.parts()] == before


@pytest.mark.parametrize("backend", ["varlen", "flash"])
@pytest.mark.parametrize(("size", "window"), [(64, None), (128, None), (256, None), (128, 300)])
def test_gradients_of_shared_keys_are_rounded_once(backend, size, window):
    """Of grouped heads: with as many copies as responses, roundings of each would show in the sum."""
    prompt, responses = [1] * 300, [[10 + i] * 40 for i in range(12)]
    tree = preftree.TokenTree.from_sequences([prompt + response for response in responses], [300] * 12)
    row, rule = preftree.pack([tree], 800)[0].to("cuda"), CAUSAL if window is None else sliding_window(window)
    torch.manual_seed(0)
    tensors = [torch.randn(1, n, 800, size, device="cuda").bfloat16() for n in (8, 2, 2, 8)]
    layer = Layer.of(*tensors[:3], rule, Scores(size**-0.5))
    if (reason := BACKENDS[backend].refusal(layer)) is not None:
        pytest.skip(reason)

    def gradients(backend, dtype):
        *inputs, weight = (x.to(dtype).requires_grad_() for x in tensors)
        out = BACKENDS[backend].bind(row, rule)(*inputs, Scores(size**-0.5))
        return [x.double()[:, :, :300] for x in torch.autograd.grad(out, inputs[1:], weight)]

    for exact, found in zip(gradients("dense", torch.float64), gradients(backend, torch.bfloat16), strict=True):
        # What one rounding costs, and what the kernel's own products of bfloat16 do.
        rounding = (exact.bfloat16().double() - exact).norm()
        assert (found - exact).norm() <= 2 * rounding


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_same_bits_in_two_runs(backend):
    """The paths' kernel where deterministic algorithms are asked for; FlexAttention anyway."""
    row = long_row(1500, seed=3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1500, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (8, 2, 2))
    layer = Layer.of(q, k, v, CAUSAL, Scores(1.0))
    if (reason := BACKENDS[backend].refusal(layer)) is not None:
        pytest.skip(reason)
    weight = torch.randn(1, 8, 1500, 128, device="cuda", dtype=torch.bfloat16)

    def run():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = BACKENDS[backend].bind(row, CAUSAL)(*inputs, Scores(128**-0.5))
        (out * weight).sum().backward()
        return [out, *[x.grad for x in inputs]]

    if backend == "flex":
        pairs = [zip(run(), run(), strict=True)]
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            pairs = [zip(run(), run(), strict=True) for _ in range(5)]
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for pair in pairs for first, second in pair)


def test_flash_is_not_chosen_where_bits_must_repeat():
    """It is refused by name; "auto" goes on without it."""
    row = long_row(300)
    q = torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    layer = Layer.of(q, q, q, CAUSAL, Scores(1.0))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(NotImplementedError, match=r"no fixed order|flash-attn-4|capability"):
            choose_backend("flash", layer, row)
        assert choose_backend("auto", layer, row) in ("varlen", "flex")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [(2, 128), (3, 40), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copying_kernels_agree_with_slices(dtype, width):
    """The Triton kernels against the slices that a CPU uses: bit by bit, and the way back."""
    row = long_row(900, seed=1)
    for window in (None, 30):
        results = []
        for device in ("cuda", "cpu"):
            here = row.to(device)
            torch.manual_seed(0)
            # Rows of keys lie among the queries' in memory, as in a fused projection.
            fused = torch.randn(900, 4, *width[1:]).to(dtype).to(device)
            k = fused[:, : min(width[0], 2)].clone().requires_grad_() if width[0] < 3 else fused[:, 1:].requires_grad_()
            v = torch.randn(900, *width).to(dtype).to(device).requires_grad_()
            copied = copy_to_paths(k, v, plan_paths(here, window))
            torch.manual_seed(1)
            weights = [torch.randn(x.shape).to(dtype).to(device) for x in copied]
            grads = torch.autograd.grad(copied, (k, v), weights)
            results.append([x.cpu() for x in (*copied, *grads)])
        for on_gpu, on_cpu in zip(*results, strict=True):
            assert torch.equal(on_gpu, on_cpu)


@pytest.mark.parametrize("window", [None, 70])
def test_preparation_does_not_wait_for_the_device(window):
    """Neither block lists nor path plans read anything back; and they are what the CPU makes."""
    row = long_row(2000)
    rule = CAUSAL if window is None else sliding_window(window)
    q = torch.randn(1, 2000, 2, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    for backend in ("flash", "flex", "varlen"):
        if BACKENDS[backend].refusal(Layer.of(q, q, q, rule, Scores(1.0))) is None:
            TreeAttention(row, rule, backend)(q, q, q, Scores(1.0))  # compiles
    torch.cuda.synchronize()
    row.derived.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        key_lists(row, rule, 128, 128)
        plan = plan_paths(row, window)
        for backend in ("flash", "varlen"):
            if BACKENDS[backend].refusal(Layer.of(q, q, q, rule, Scores(1.0))) is None:
                TreeAttention(row, rule, backend)(q, q, q, Scores(1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = row.to("cpu")
    assert torch.equal(plan.copies.cpu(), plan_paths(here, window).copies)


@pytest.mark.parametrize("rule", ["causal", "window", "wide", "chunk"])
@pytest.mark.parametrize(
    "blocks", [(128, 128), (64, 128), (128, 112), (64, 96), (192, 128), (128, 80), (24, 12)], ids=str
)
@pytest.mark.parametrize("length", [130, 1111, 3000])
def test_lists_of_blocks_are_those_made_in_torch(length, blocks, rule):
    """The kernels' lists on the GPU against those that torch makes on the host, which are tested entry by entry."""
    row = long_row(length, seed=length)
    here = row.to("cpu")
    assert torch.equal(nodes_of(row, RULES[rule])[:, :length].cpu(), nodes_of(here, RULES[rule])[:, :length])
    for lists in (key_lists, query_lists):
        for on_gpu, on_host in zip(lists(row, RULES[rule], *blocks), lists(here, RULES[rule], *blocks), strict=True):
            assert torch.equal(on_gpu.cpu(), on_host), lists.__name__
