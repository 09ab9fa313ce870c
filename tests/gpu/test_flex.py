"""FlexAttention on a GPU against the dense specification: outputs and every gradient, odd shapes, families whole."""

import pytest
import torch
from families import VOCABULARY, exact_model
from oracle import compare_with_stock, random_sequences

import preftree
from preftree.attention import BACKENDS, Scores
from preftree.attention.mask import CAUSAL, Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What FlexAttention says when it is not compiled, as after too many compilations.
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),
]

WINDOW = Rule(lambda b, h, q, k: (k <= q) & (k > q - 50), reach=50)


def long_row(length, seed=0):
    """A row of trees with runs of up to a few hundred tokens, padded to ``length``."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def draw(size):
        return torch.randint(0, 9, (size,), generator=generator).tolist()

    trees, used = [], 0
    while True:
        prompt = draw(integer(5, min(length // 3, 200)))
        members = [[*prompt, 10 + branch, *draw(integer(3, min(length // 5, 150)))] for branch in range(integer(1, 4))]
        tree = preftree.TokenTree.from_sequences(members, [len(prompt)] * len(members))
        if used + len(tree) > length:
            return preftree.pack(trees, length)[0].to("cuda") if trees else None
        trees.append(tree)
        used += len(tree)


@pytest.mark.parametrize("length", [72, 129, 1000])
@pytest.mark.parametrize("rule", [CAUSAL, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("special", ["plain", "grouped", "three-groups", "softcap", "sinks", "value-size"])
def test_flex_agrees_with_dense(special, rule, length):
    """bf16 against float64; no farther from it than dense attention in bf16 is, within a factor."""
    row = next(row for seed in range(20) if (row := long_row(length, seed)) is not None)
    heads, groups = {"plain": (4, 4), "three-groups": (6, 3)}.get(special, (8, 2))
    size, value_size = 64, (32 if special == "value-size" else 64)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = draw(1, heads, length, size), draw(1, groups, length, size), draw(1, groups, length, value_size)
    sinks = draw(heads) if special == "sinks" else None
    weight = draw(1, heads, length, value_size)
    weight[:, :, row.num_tokens :] = 0

    def run(backend, dtype):
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (q, k, v)]
        sink = None if sinks is None else sinks.to(dtype).requires_grad_()
        scores = Scores(size**-0.5, 2.0 if special == "softcap" else None, sink)
        out = BACKENDS[backend](row, rule)(*inputs, scores)
        (out * weight.to(dtype)).sum().backward()
        grads = [x.grad for x in inputs] + ([] if sink is None else [sink.grad])
        return [x.double() for x in (out[:, :, : row.num_tokens], *grads)]

    exact, dense, flex = run("dense", torch.float64), run("dense", torch.bfloat16), run("flex", torch.bfloat16)
    for name, truth, by_dense, by_flex in zip(("out", "dq", "dk", "dv", "dsinks"), exact, dense, flex, strict=False):
        error, allowed = (by_flex - truth).norm(), (by_dense - truth).norm()
        assert error <= 2 * allowed + 1e-3 * truth.norm(), name


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_family_is_exact_through_flex(name):
    """Float32, whole model: against the stock model on each sequence alone."""
    torch.backends.cuda.matmul.allow_tf32 = False
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    model = exact_model(name, size=16).cuda()
    logps, gradients = compare_with_stock(model, groups, backend="flex")
    assert logps <= 1e-4
    assert max(gradients.values()) <= 1e-3


def test_auto_is_flex_and_row_moves_to_the_model():
    model = preftree.prepare_model(exact_model("llama", size=16).cuda())
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3], [1, 4]], [1, 1])], 128)[0]
    out = preftree.sequence_logps(model, row)
    assert out.logps.device.type == "cuda"
    cpu = preftree.sequence_logps(preftree.prepare_model(exact_model("llama", size=16)), row)
    torch.testing.assert_close(out.logps.cpu(), cpu.logps, rtol=1e-4, atol=1e-4)
