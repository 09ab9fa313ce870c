"""Backends against the dense specification, gradients too; and which of them serves a layer."""

import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from oracle import random_row, seen_by_walking_up, walks_up

import preftree
from preftree import attention
from preftree.attention import (
    BACKENDS,
    Layer,
    Scores,
    TreeAttention,
    check_backend,
    choose_backend,
    fa4,
    flash,
    flex,
    passes,
    trial,
    varlen,
    varlen_kernels,
)
from preftree.attention.blocks import key_lists, nodes_of, query_lists
from preftree.attention.copying import copy_to_paths
from preftree.attention.mask import CAUSAL, Rule, chunks, sliding_window
from preftree.attention.paths import plan_paths
from preftree.packing import empty_row

# Known by its function alone, as a family's own masks are; every query sees itself.
OTHER = Rule(lambda b, h, q, k: (k == q) | ((k < q) & (k > q - 9) & (k % 3 != q % 2)), reach=9)
RULES = {"causal": CAUSAL, "window": sliding_window(5), "chunk": chunks(7), "other": OTHER}
IN_PYTHON = {
    "causal": lambda q, k: True,
    "window": lambda q, k: q - k < 5,
    "chunk": lambda q, k: k // 7 == q // 7,
    "other": lambda q, k: k == q or (q - k < 9 and k % 3 != q % 2),
}
SPECIALS = ["plain", "grouped", "softcap", "sinks", "bias", "value-size"]


def compare_with_dense(bind, row, rule, special, padding):
    """Outputs and gradients of ``bind`` and of the specification; at the row's padding as far as ``padding`` says."""
    heads, groups, size, value_size = (1, 1, 7, 7) if special == "plain" else (6, 2, 10, 10)
    if special == "value-size":
        value_size = 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = {
        "q": draw(1, heads, len(row), size),
        "k": draw(1, groups, len(row), size),
        "v": draw(1, groups, len(row), value_size),
        "sinks": draw(heads) if special == "sinks" else None,
        "bias": draw(1, heads, len(row), len(row)) if special == "bias" else None,
    }
    weight = draw(1, heads, len(row), value_size)
    counted = len(row) if padding else row.num_tokens
    weight[:, :, counted:] = 0
    results = []
    for one in (BACKENDS["dense"].bind, bind):
        inputs = {name: x.clone().requires_grad_() for name, x in given.items() if x is not None}
        scores = Scores(0.3, 1.5 if special == "softcap" else None, inputs.get("sinks"), inputs.get("bias"))
        out = one(row, rule)(inputs["q"], inputs["k"], inputs["v"], scores)
        (out * weight).sum().backward()
        results.append([out[:, :, :counted], *[x.grad for x in inputs.values()]])
    for dense, other in zip(*results, strict=True):
        torch.testing.assert_close(other, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("special", SPECIALS)
def test_varlen_agrees_with_dense(special, name):
    # (In the specification a sink takes part in the softmax of padding too, path by path it does not.)
    compare_with_dense(BACKENDS["varlen"].bind, random_row(11), RULES[name], special, padding=special != "sinks")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
def test_varlen_agrees_with_dense_on_long_paths(name, seed):
    compare_with_dense(
        BACKENDS["varlen"].bind, random_row(seed, stretch=4, spare=0), RULES[name], "plain", padding=True
    )


def attend_like_a_kernel(q_SHD, k_KGD, v_KGE, plan, window, scores):
    """What a variable-length kernel computes: causal from the bottom right, padding zero."""
    out = []
    starts = zip(plan.query_starts.tolist(), plan.key_starts.tolist(), strict=True)
    first, first_key = next(starts)
    for last, last_key in starts:
        for head in range(q_SHD.shape[1]):
            group = head * k_KGD.shape[1] // q_SHD.shape[1]
            x_QK = scores.scale * q_SHD[first:last, head] @ k_KGD[first_key:last_key, group].T
            query = torch.arange(last - first)[:, None] + (last_key - first_key) - (last - first)
            key = torch.arange(last_key - first_key)[None, :]
            hidden = key > query if window is None else (key > query) | (key < query - window + 1)
            out.append(x_QK.masked_fill(hidden, -torch.inf).softmax(-1) @ v_KGE[first_key:last_key, group])
        first, first_key = last, last_key
    heads = [torch.cat(out[head :: q_SHD.shape[1]]) for head in range(q_SHD.shape[1])]
    return torch.nn.functional.pad(torch.stack(heads, 1), (0, 0, 0, 0, 0, len(q_SHD) - first))


@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize("special", ["plain", "grouped", "value-size"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("by", ["torch", "fa4"])
def test_one_kernel_over_copied_paths_agrees_with_dense(by, seed, special, name, monkeypatch):
    asked, plans = [], []

    def kernel(q_SHD, k_SGD, v_SGE, plan, window, scores):
        plans.append(plan)
        k_KGD, v_KGE = copy_to_paths(k_SGD, v_SGE, plan)
        return attend_like_a_kernel(q_SHD, k_KGD, v_KGE, plan, window, scores)

    def forward(*given):
        with torch.no_grad():
            return kernel(*given), torch.full((given[0].shape[1], given[3].num_tokens), 7.0)

    def backward(grad, q_SHD, k_SGD, v_SGE, out_SHE, lse_HT, *given):
        assert lse_HT.shape == (q_SHD.shape[1], given[0].num_tokens)
        assert (lse_HT == 7).all()
        tensors = [x.detach().requires_grad_() for x in (q_SHD, k_SGD, v_SGE)]
        with torch.enable_grad():
            again = kernel(*tensors, *given)
        torch.testing.assert_close(out_SHE, again)
        return *torch.autograd.grad(again, tensors, grad), None

    monkeypatch.setattr(varlen_kernels, "choose", lambda layer: asked.append(layer) or by)
    monkeypatch.setattr(varlen, "_fa4_works", lambda kind, device: True)
    monkeypatch.setattr(varlen_kernels, "by_torch", kernel)
    monkeypatch.setattr(varlen_kernels, "fa4_forward", forward)
    monkeypatch.setattr(varlen_kernels, "fa4_backward", backward)
    row = random_row(seed, stretch=3)
    compare_with_dense(BACKENDS["varlen"].bind, row, RULES[name], special, padding=False)
    assert [layer.rule for layer in asked] == [RULES[name]]
    plan = plans[0]
    assert all(each is plan for each in plans)
    # Keys before all that a window shows are not copied.
    assert plan is plan_paths(row, RULES[name].window)


@pytest.mark.parametrize("name", RULES)
def test_dense_is_written_out_softmax(name):
    """The specification itself, against a loop over queries."""
    row = random_row(2, trees=2)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(1, 4, len(row), 5), draw(1, 2, len(row), 5), draw(1, 2, len(row), 3)
    sinks, bias = draw(4), draw(1, 4, len(row), len(row))
    out = BACKENDS["dense"].bind(row, RULES[name])(q, k, v, Scores(0.7, 2.0, sinks, bias))
    for query, walk in enumerate(walks_up(row)):
        position = len(walk) - 1
        keys = [key for steps, key in enumerate(walk) if IN_PYTHON[name](position, position - steps)]
        for head, group in enumerate((0, 0, 1, 1)):
            x = 2.0 * torch.tanh(0.7 * k[0, group, keys] @ q[0, head, query] / 2.0) + bias[0, head, query, keys]
            weights = x.exp() / (x.exp().sum() + sinks[head].exp())
            torch.testing.assert_close(out[0, head, query], weights @ v[0, group, keys])


@pytest.mark.parametrize(("rule", "pairs"), [(CAUSAL, 39 * 39 + 5 * 35), (sliding_window(5), 39 * 39 + 5 * 9)])
def test_work_is_linear_in_packed_trees(rule, pairs, monkeypatch):
    """Twice the trees in a row: twice the query-key pairs, not four times."""
    tree = preftree.TokenTree.from_sequences([[1] * 30 + [2] * 9, [1] * 30 + [3] * 5], [30, 30])
    counted = []

    def count(q, k, v, **kwargs):
        counted.append(q.shape[2] * k.shape[2])
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", count)
    for copies in (3, 6):
        row = preftree.pack([tree] * copies)[0]
        counted.clear()
        q = torch.zeros(1, 1, len(row), 4)
        BACKENDS["varlen"].bind(row, rule)(q, q, q, Scores(1.0))
        assert sum(counted) == copies * pairs


@pytest.mark.parametrize("backend", ["dense", "varlen"])
def test_row_of_padding(backend):
    row = empty_row(8)
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    others = [torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(2)]
    for rule in RULES.values():
        out = BACKENDS[backend].bind(row, rule)(*others, x, Scores(1.0))
        torch.testing.assert_close(out, x)
        # Ranks wait for each other's gradients: there must be some.
        gradients = torch.autograd.grad(out.sum(), (*others, x))
        torch.testing.assert_close(torch.stack(gradients[:2]), torch.zeros(2, 1, 2, 8, 4))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [16, 128])
def test_what_flex_asks_of_each_pair(block, name):
    """Its mask function on all pairs; and with it alone in partial blocks, the blocks' whole mask."""
    row = random_row(4, stretch=3)
    visible = seen_by_walking_up(row, IN_PYTHON[name])
    mask = flex.block_mask(row, RULES[name], block)
    node, zero = torch.arange(len(row)), torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, node[:, None], node[None, :]), visible)
    blocks = -(-len(row) // block)
    lists = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices]
    transposed = [mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices]
    for (counts, indices, full_counts, full_indices), turned in ((lists, False), (transposed, True)):
        by_blocks = torch.zeros(len(row), len(row), dtype=torch.bool)
        pairs = visible.T if turned else visible
        target = by_blocks.T if turned else by_blocks
        for i in range(blocks):
            rows = slice(i * block, (i + 1) * block)
            for j in indices[0, 0, i, : counts[0, 0, i]].tolist():
                columns = slice(j * block, (j + 1) * block)
                target[rows, columns] = pairs[rows, columns]
            for j in full_indices[0, 0, i, : full_counts[0, 0, i]].tolist():
                target[rows, j * block : (j + 1) * block] = True
        assert torch.equal(by_blocks, visible)


def test_flex_makes_masks_of_known_rules_once():
    row = random_row(0)
    first = flex.block_mask(row, sliding_window(5))
    assert flex.block_mask(row, sliding_window(5)) is first
    for other in (sliding_window(6), chunks(5), CAUSAL):
        assert flex.block_mask(row, other) is not first
    assert flex.block_mask(random_row(0), sliding_window(5)) is not first
    flex.block_mask(row, OTHER)
    # A rule known by its function is known by nothing that outlives it.
    assert not any(key[1] == OTHER.key for key in row.derived)


@pytest.mark.parametrize("name", ["causal", "window", "chunk"])
def test_what_flash_reads_of_the_row(name):
    row = random_row(4, stretch=3)
    nodes = nodes_of(row, RULES[name])
    lists = [*key_lists(row, RULES[name], 128, 64), *query_lists(row, RULES[name], 64, 16)]
    assert nodes.dtype == torch.int32
    assert nodes.is_contiguous()
    # Tiles reach behind the row's end.
    assert nodes.shape[1] >= -(-len(row) // 128) * 128
    end, position, lowest = nodes.tolist()
    visible = seen_by_walking_up(row, IN_PYTHON[name])
    for query in range(len(row)):
        got = [k <= query < end[k] and position[k] >= lowest[query] for k in range(len(row))]
        assert got == visible[query].tolist()
    counts, indices, full_counts, full_indices = (x[0, 0].tolist() for x in lists[:4])
    for i, first in enumerate(range(0, len(row), 128)):
        cells = [visible[first : first + 128, j : j + 64] for j in range(0, len(row), 64)]
        full = [j for j, cell in enumerate(cells) if cell.numel() == 128 * 64 and cell.all()]
        assert full_indices[i][: full_counts[i]] == full
        assert indices[i][: counts[i]] == [j for j, cell in enumerate(cells) if cell.any() and j not in full]
    counts, indices, full_counts, full_indices = (x[0, 0].tolist() for x in lists[4:8])
    for j, first in enumerate(range(0, len(row), 16)):
        cells = [visible[i : i + 64, first : first + 16] for i in range(0, len(row), 64)]
        full = [i for i, cell in enumerate(cells) if cell.numel() == 64 * 16 and cell.all()]
        assert full_indices[j][: full_counts[j]] == full
        assert indices[j][: counts[j]] == [i for i, cell in enumerate(cells) if cell.any() and i not in full]
    assert nodes_of(row, RULES[name]) is nodes


@pytest.mark.parametrize(("heads", "sizes"), [((4, 2), (16, 16)), ((3, 3), (24, 8))])
@pytest.mark.parametrize("backend", ["dense", "varlen"])
def test_trials_find_right_what_autograd_gives(backend, heads, sizes):
    row = trial.trial_row(torch.device("cpu"))
    assert len(row) > row.num_tokens > 3 * 96
    found = trial.errors(
        TreeAttention(row, CAUSAL, backend), row, Layer("cpu", None, torch.float32, *heads, *sizes, CAUSAL)
    )
    assert len(found) == 4
    assert max(found) < 1e-5


# What FlashAttention-4 on a Hopper GPU takes.
ON_HOPPER = Layer("cuda", (9, 0), torch.bfloat16, 8, 2, 64, 64, CAUSAL)
ON_CPU = Layer("cpu", None, torch.float32, 8, 2, 64, 64, CAUSAL)


@pytest.fixture
def fa4_installed(monkeypatch):
    monkeypatch.setattr(fa4, "library", lambda: ModuleType("flash_attn.cute.interface"))
    monkeypatch.setattr(flash, "works", lambda layer, device: True)


def wrong_in(kind, attention):
    """``attention``'s two passes with an error in one of the results, or none."""

    class Wrong(attention):
        def forward(self, *given):
            if kind == "raises":
                raise RuntimeError("no such part")
            out, lse = TreeAttention(self.row, self.rule, "dense").forward(*given)
            out[:, :, self.row.num_tokens :] = 0  # as paths' kernels leave it
            return out * {"out": 1.1, "nan": torch.nan}.get(kind, 1), lse

        def backward(self, *given):
            *gradients, sinks, bias = TreeAttention(self.row, self.rule, "dense").backward(*given)
            names = ("dq", "dk", "dv")
            return (*(x * (1 + 0.1 * (kind == name)) for name, x in zip(names, gradients, strict=True)), sinks, bias)

    return Wrong


@pytest.mark.parametrize("rule", ["causal", "window"])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("by_entry", ["right", "wrong"])
@pytest.mark.parametrize("by_bits", ["right", "out", "dq", "dk", "dv", "nan", "raises"])
def test_kernels_of_trees_are_tried_once(by_bits, by_entry, there, rule, monkeypatch):
    """By the numbers that the passes give: masks as bits, the library's own where these are wrong, or another backend."""
    calls = []
    as_bits, own = (wrong_in(kind, flash._OnRow) for kind in (by_bits, "right" if by_entry == "right" else "dq"))

    def bind(row, rule, bits):
        calls.append((bits, rule.causal))
        return (as_bits if bits else own)(row, rule)

    monkeypatch.setattr(flash, "_OnRow", bind)
    monkeypatch.setattr(flash, "masks_are_own", lambda: there)
    flash._takes_bits.cache_clear()
    layer = replace(ON_CPU, groups=4, size=16, value_size=16, rule=RULES[rule])
    expected = True if there and by_bits == "right" else False if by_entry == "right" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert {flash.works(layer, torch.device("cpu")) for _ in range(3)} == {expected is not None}
        assert flash._takes_bits(trial.kind_of(layer), torch.device("cpu")) == expected
    flash._takes_bits.cache_clear()
    causal = rule == "causal"
    assert calls == [(True, causal)] * there + [(False, causal)] * (expected is not True)
    assert len(caught) == (there and expected is not True) + (expected is None)
    if there and by_bits == "raises":
        assert "RuntimeError: no such part" in str(caught[0].message)


@pytest.mark.parametrize("wrong", [None, "dq", "raises"])
def test_kernel_of_paths_is_tried_once(wrong, monkeypatch, fa4_installed):
    """torch's own serves where FlashAttention-4's gives what it should not."""
    own = wrong_in(wrong, varlen._OnRow)
    monkeypatch.setattr(varlen, "_OnRow", lambda row, rule, kernel: own(row, rule))
    varlen._fa4_works.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = {varlen._kernel_for(ON_HOPPER, torch.device("cpu")) for _ in range(3)}
    varlen._fa4_works.cache_clear()
    assert found == {"torch" if wrong else "fa4"}
    assert len(caught) == (wrong is not None)


@pytest.mark.parametrize("size", range(8, 257, 8))
def test_head_sizes_that_kernels_are_given(size):
    """Whole 16 and whole 32 are the same."""
    whole = fa4.whole_size(size)
    assert size <= whole < size + 32
    assert -(-whole // 16) * 16 == -(-whole // 32) * 32
    assert whole == size or size % 32 in (8, 16)
    x = torch.randn(1, 3, 5, size)
    wide, other = fa4.widened(x, x[..., :8])
    assert (wide.shape[-1], other.shape[-1]) == (whole, 32)
    assert torch.equal(torch.nn.functional.pad(x, (0, whole - size)), wide)
    assert torch.equal(x, fa4.narrowed(wide, size))


def test_on_a_cpu_auto_is_varlen():
    row = random_row(0)
    for layer in (ON_CPU, replace(ON_CPU, rule=OTHER), replace(ON_CPU, dtype=torch.bfloat16, softcap=True)):
        assert choose_backend("auto", layer, row) == "varlen"


@pytest.mark.parametrize("name", ["dense", "varlen"])
def test_backends_that_serve_everything(name):
    odd = {"dtype": torch.float64, "size": 20, "value_size": 3, "rule": OTHER, "bias": True, "sinks": True}
    for layer in (ON_CPU, replace(ON_CPU, **odd), replace(ON_HOPPER, **odd)):
        assert choose_backend(name, layer, random_row(0)) == name
    check_backend(name, torch.device("cpu"))


@pytest.mark.usefixtures("fa4_installed")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 20}, "the queries have 20"),
        ({"value_size": 20}, "the values have 20"),
        ({"size": 264, "value_size": 264}, "the queries have 264"),
        ({"dtype": torch.float32}, "not float32"),
        ({"capability": (8, 0)}, r"9\.x, this device has 8\.0"),
        ({"capability": (10, 0)}, r"9\.x, this device has 10\.0"),
        ({"rule": OTHER}, "neither causal nor a sliding window nor chunks"),
        ({"bias": True}, "a bias for each pair"),
        ({"size": 192, "value_size": 128}, "values of the queries' head size"),
        ({"heads": 7}, "7 query heads do not divide among 2"),
        ({"device": "cpu", "capability": None}, "needs a CUDA device, not 'cpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_flash_refuses(changes, reason, monkeypatch):
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    layer = replace(ON_HOPPER, **changes)
    with pytest.raises(NotImplementedError, match=f"backend 'flash' cannot serve this layer: .*{reason}"):
        choose_backend("flash", layer, random_row(0))
    assert choose_backend("auto", layer, random_row(0)) != "flash"


@pytest.mark.usefixtures("fa4_installed")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rule": sliding_window(5)},
        {"rule": chunks(7)},
        {"dtype": torch.float16},
        {"softcap": True, "sinks": True},
        {"size": 256, "value_size": 256},
        {"size": 192, "value_size": 128, "groups": 8},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_what_flash_serves(changes):
    layer = replace(ON_HOPPER, **changes)
    assert flash.refusal(layer) is None
    assert choose_backend("flash", layer, random_row(0)) == "flash"


def test_flash_without_its_library(monkeypatch):
    monkeypatch.setattr(fa4, "library", lambda: "flash-attn-4 is not installed")
    with pytest.raises(NotImplementedError, match="not installed"):
        choose_backend("flash", ON_HOPPER, random_row(0))
    assert varlen_kernels.fa4_refusal(ON_HOPPER) == "flash-attn-4 is not installed"


@pytest.mark.usefixtures("fa4_installed")
@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "fa4"),
        ({"capability": (10, 0)}, "fa4"),
        ({"rule": sliding_window(5)}, "fa4"),
        ({"softcap": True}, "fa4"),
        ({"capability": (8, 0), "groups": 8}, "torch"),
        ({"capability": (8, 0), "groups": 8, "rule": sliding_window(5)}, "torch"),
        ({"capability": (8, 0), "groups": 8, "softcap": True}, None),
        ({"capability": (8, 0), "groups": 8, "sinks": True}, None),
        ({"capability": (7, 5), "groups": 8}, None),
        ({"rule": chunks(7)}, None),
        ({"rule": OTHER}, None),
        ({"bias": True}, None),
        ({"dtype": torch.float32}, None),
        ({"size": 20, "value_size": 20}, None),
        ({"device": "cpu", "capability": None}, None),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_kernels_that_go_path_by_path(changes, kernel):
    assert varlen_kernels.choose(replace(ON_HOPPER, **changes)) == kernel


@pytest.mark.parametrize("beside", ["nothing", "sinks", "bias", "softcap"])
@pytest.mark.parametrize("trained", [[0, 1, 2, 3], [1], [3]])
def test_two_passes_are_one_differentiable_call(beside, trained):
    """As dense attention, whose gradients autograd knows; what is kept between the passes arrives."""
    row = random_row(3)
    attend = BACKENDS["dense"].bind(row, CAUSAL)

    class Passes:
        def forward(self, q, k, v, scores):
            out, _ = passes.recomputed_forward(attend, q, k, v, scores)
            return out, torch.full((1, q.shape[1], len(row)), 7.0)

        def backward(self, grad, q, k, v, out, lse, scores):
            assert torch.equal(out, attend(q, k, v, scores))
            assert (lse == 7).all()
            return passes.recomputed_backward(attend, grad, q, k, v, scores)

    torch.manual_seed(0)
    given = [torch.randn(1, heads, len(row), size, dtype=torch.float64) for heads, size in ((4, 6), (2, 6), (2, 5))]
    extra = torch.randn(4) if beside == "sinks" else torch.randn(1, 4, len(row), len(row))
    results = []
    for call in (attend, lambda *given: passes.differentiable(Passes(), *given)):
        tensors = [x.clone().requires_grad_(i in trained) for i, x in enumerate((*given, extra.double()))]
        options = {beside: tensors[3]} if beside in ("sinks", "bias") else {}
        out = call(*tensors[:3], Scores(0.3, 2.0 if beside == "softcap" else None, **options))
        assert out.requires_grad == any(i in trained for i in range(3 + len(options)))
        if out.requires_grad:
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
        results.append([out, *(x.grad for x in tensors)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_what_flex_refuses(monkeypatch):
    row = random_row(0)
    with pytest.raises(NotImplementedError, match=r"'flex' cannot serve this layer: .*no backward pass on 'cpu'"):
        choose_backend("flex", ON_CPU, row)
    with pytest.raises(NotImplementedError, match=r"'flex' cannot be used on 'cpu': .*no backward pass"):
        check_backend("flex", torch.device("cpu"))
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    assert choose_backend("flex", replace(ON_HOPPER, rule=OTHER, bias=True, dtype=torch.float32), row) == "flex"
    with pytest.raises(NotImplementedError, match="not float64"):
        choose_backend("flex", replace(ON_HOPPER, dtype=torch.float64), row)
    with pytest.raises(NotImplementedError, match="head sizes from 16, not 64 and 8"):
        choose_backend("flex", replace(ON_HOPPER, value_size=8), row)
    by_token = replace(ON_HOPPER, rule=replace(OTHER, nodes=OTHER.function), dtype=torch.float32)
    assert choose_backend("auto", by_token, row) == "flex"
    with pytest.warns(UserWarning, match="no kernel for trees .* flex: its kernels take head sizes from 16"):
        assert choose_backend("auto", replace(by_token, size=8), row) == "dense"
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    with pytest.raises(NotImplementedError, match="Triton, which is not installed"):
        choose_backend("flex", ON_HOPPER, row)


@pytest.mark.usefixtures("fa4_installed")
def test_backends_on_a_device():
    check_backend("auto", torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"'flash' cannot be used on 'cpu': .*needs a CUDA device"):
        check_backend("flash", torch.device("cpu"))
    with pytest.raises(ValueError, match="unknown attention backend 'fast': choose from 'auto', 'dense'"):
        check_backend("fast", torch.device("cpu"))


def test_fallback_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    monkeypatch.setattr(attention, "_warned", set())
    layer = replace(ON_HOPPER, rule=OTHER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose_backend("auto", layer, random_row(0)) for _ in range(2)] == ["varlen", "varlen"]
    (warning,) = [str(one.message) for one in caught]
    assert "no kernel for trees" in warning
    assert "neither causal nor a sliding window" in warning
    assert "Triton, which is not installed" in warning
    with pytest.warns(UserWarning, match="not float64"):
        choose_backend("auto", replace(layer, rule=CAUSAL, dtype=torch.float64, capability=(9, 0)), random_row(0))


def test_a_layer_is_read_off_its_call():
    q, k, v = torch.zeros(1, 6, 9, 8), torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 4)
    layer = Layer.of(q, k, v, OTHER, Scores(1.0))
    assert layer == Layer("cpu", None, torch.float32, 6, 2, 8, 4, OTHER)
    scores = Scores(1.0, 2.0, torch.zeros(6), torch.zeros(1, 6, 9, 9))
    assert Layer.of(q, k, v, OTHER, scores) == replace(layer, softcap=True, sinks=True, bias=True)


@pytest.mark.parametrize("backend", ["auto", "dense", "varlen"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_autocast_reaches_what_layers_hand_over(value_dtype, backend):
    row = random_row(0)
    q, k = torch.randn(1, 4, len(row), 8), torch.randn(1, 2, len(row), 8)
    v = torch.randn(1, 2, len(row), 8, dtype=value_dtype)
    tree = TreeAttention(row, CAUSAL, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tree(q, k, v, Scores(0.3))
    assert out.dtype == torch.bfloat16
    exact = BACKENDS["dense"].bind(row, CAUSAL)(q, k, v.float(), Scores(0.3))
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_backends_are_chosen_for_what_autocast_makes(monkeypatch):
    row, chosen = random_row(0), []
    monkeypatch.setattr(attention, "choose_backend", lambda name, layer, row: chosen.append(layer.dtype) or "dense")
    x = torch.randn(1, 2, len(row), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        TreeAttention(row, CAUSAL)(x, x, x, Scores(1.0))
    assert TreeAttention(row, CAUSAL)(x, x, x, Scores(1.0)).dtype == torch.float32
    assert chosen == [torch.bfloat16, torch.float32]


def test_a_row_is_bound_once_for_all_layers(monkeypatch):
    row, bound = random_row(0), []
    bind = BACKENDS["varlen"].bind
    monkeypatch.setattr(BACKENDS["varlen"], "bind", lambda *args: bound.append(args) or bind(*args))
    x = torch.randn(1, 2, len(row), 8)
    tree = TreeAttention(row, OTHER)
    for _ in range(3):
        tree(x, x, x, Scores(1.0))
    assert bound == [(row, OTHER)]
