"""Families whole on a GPU, through FlexAttention."""

import pytest
import torch
from families import VOCABULARY, exact_model
from oracle import compare_with_stock, random_row, random_sequences

import preftree
from preftree.attention import Rule, Scores, TreeAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What FlexAttention says when it is not compiled, as after too many compilations.
    pytest.mark.filterwarnings("error:flex_attention called without torch.compile"),
]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_family_is_exact_through_flex(name):
    """Float32, whole model: against the stock model on each sequence alone."""
    torch.backends.cuda.matmul.allow_tf32 = False
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    model = exact_model(name, size=16).cuda()
    logps, gradients = compare_with_stock(model, groups, backend="flex")
    assert logps <= 1e-4
    assert max(gradients.values()) <= 1e-3


@pytest.mark.parametrize("stretch", [1, 40])
def test_tokens_that_see_what_is_behind_them(stretch):
    """A rule that knows nodes (an image's in both directions), next to the specification."""
    torch.backends.cuda.matmul.allow_tf32 = False
    row = random_row(3, stretch=stretch).to("cuda")
    image = torch.arange(len(row), device="cuda") // (3 * stretch) % 3 == 0

    def sees(batch, head, query, key):
        return (key <= query) | (image[query] & image[key])

    rule = Rule(sees, nodes=sees)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, 4, len(row), 16)
    given = [torch.randn(shape, generator=generator, device="cuda", requires_grad=True) for _ in range(3)]
    weights = torch.randn(shape, generator=generator, device="cuda")
    weights[:, :, row.num_tokens :] = 0
    results = []
    for backend in ("dense", "flex"):
        out = TreeAttention(row, rule, backend)(*given, Scores(0.25))
        results.append([out[:, :, : row.num_tokens], *torch.autograd.grad((out * weights).sum(), given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_row_moves_to_the_model():
    model = preftree.prepare_model(exact_model("llama", size=16).cuda())
    row = preftree.pack([preftree.TokenTree.from_sequences([[1, 2, 3], [1, 4]], [1, 1])], 128)[0]
    out = preftree.sequence_logps(model, row)
    assert out.logps.device.type == "cuda"
    cpu = preftree.sequence_logps(preftree.prepare_model(exact_model("llama", size=16)), row)
    torch.testing.assert_close(out.logps.cpu(), cpu.logps, rtol=1e-4, atol=1e-4)
