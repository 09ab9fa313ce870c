"""Parts along paths on a GPU, with their kernels where these are installed: exact in float32, as near in half precision."""

import copy

import pytest
import torch
from families import ALONG_PATHS, VOCABULARY, build, exact_model
from oracle import compare_with_stock, random_sequences, stock_logps

import preftree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.* run along each path"),
]


@pytest.mark.parametrize("name", ALONG_PATHS)
def test_family_is_exact(name, monkeypatch):
    # cuDNN convolves in TF32 by default, in the stock model too, and not alike for batches of other sizes.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    groups = random_sequences(torch.Generator().manual_seed(0), VOCABULARY)
    logps, gradients = compare_with_stock(exact_model(name).cuda(), groups)
    # Products of other numbers of rows are other kernels there, with other rounding.
    assert logps <= 1e-5
    worst = max(gradients, key=gradients.get)
    assert gradients[worst] <= 5e-5, worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["lfm2", "mamba2", "falcon_h1", "qwen3_5"])
def test_half_precision(name, compiled, dtype):
    """Log-probs and gradients are as near to float32's as those of the stock model in that type."""
    family, settings, *_ = ALONG_PATHS[name]
    exact = build(family, settings).cuda()
    with torch.no_grad():
        for parameter in exact.parameters():
            # What half precision holds: the models differ by their arithmetic alone.
            parameter.copy_(parameter.to(dtype))
    stock = copy.deepcopy(exact).to(dtype)
    shared = preftree.prepare_model(copy.deepcopy(stock), compile=compiled)
    groups = random_sequences(torch.Generator().manual_seed(1), VOCABULARY, trees=5)
    row = preftree.pack([preftree.TokenTree.from_sequences(*group) for group in groups])[0].to("cuda")
    sequences = [sequence for group in groups for sequence in zip(*group, strict=True)]
    signs = torch.linspace(-1, 1, len(sequences), device="cuda")

    def trained(model, logps):
        (logps * signs).sum().backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        return {"": logps.detach().double(), **gradients}

    right, theirs = (
        trained(model, torch.stack([stock_logps(model, *sequence) for sequence in sequences]))
        for model in (exact, stock)
    )
    logps = preftree.sequence_logps(shared, row).logps
    ours = trained(shared, torch.zeros_like(logps).index_put((row.sequence_ids,), logps))
    assert ours.keys() == right.keys()
    errors = [
        torch.stack([(numbers[name] - truth).norm() / truth.norm() for name, truth in right.items() if truth.any()])
        for numbers in (theirs, ours)
    ]
    assert 0 < errors[0][0] <= 0.02
    assert errors[1][0] <= 1.5 * errors[0][0]
    # A small tensor's rounding is chance, that of all of them is not.
    assert 0 < errors[0].mean() <= 0.2
    assert errors[1].mean() <= 1.3 * errors[0].mean()
