"""Scores of tokens against a float64 log-softmax: values, statistics, gradients."""

import pytest
import torch

from preftree.token_scores import token_scores

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])


def exact(logits, targets):
    """In float64, by the definitions."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    return {
        "token_logps": log_p.gather(1, targets[:, None])[:, 0],
        "entropy": -torch.where(p > 0, p * log_p, 0).sum(-1),
        "mean_logits": logits.double().mean(-1),
        "is_top1": logits.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }


def draw(tokens, vocabulary, scale, dtype, device):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (scale * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    logits[0] = logits[0, 0]  # all alike: the first one is the most probable
    targets[0] = 0
    targets[1] = logits[1].argmax()
    return logits.to(device), targets.to(device)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "scale"), [(7, 1.0), (1000, 8.0), (4096, 30.0), (50000, 4.0)])
def test_scores_and_gradients(vocabulary, scale, dtype, device):
    logits, targets = draw(60, vocabulary, scale, dtype, device)
    expected = exact(logits, targets)
    # Sums round at the size of the largest logit.
    close = 3e-6 * max(1.0, scale / 4)
    logits.requires_grad_()
    got = token_scores(logits, targets, statistics=True)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name == "is_top1":
            assert torch.equal(got[name], value)
        else:
            assert got[name].dtype == torch.float32
            torch.testing.assert_close(got[name].double(), value, rtol=3e-6, atol=close, msg=name)
            assert got[name].requires_grad == (name == "token_logps")

    upstream = torch.linspace(-2, 3, len(targets), device=device)
    (gradient,) = torch.autograd.grad((got["token_logps"] * upstream).sum(), logits)
    onehot = torch.nn.functional.one_hot(targets, vocabulary)
    wanted = upstream.double()[:, None] * (onehot - logits.detach().double().softmax(-1))
    assert gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(gradient.double(), wanted, rtol=rounding + 1e-5, atol=3 * close)

    alone = token_scores(logits.detach(), targets, statistics=False)
    assert alone.keys() == {"token_logps"}
    torch.testing.assert_close(alone["token_logps"], got["token_logps"].detach())


def test_statistics_of_a_large_vocabulary():
    """Fifty thousand terms in float32 keep their digits."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 50000, generator=generator)
    targets = torch.randint(0, 50000, (200,), generator=generator)
    got = token_scores(logits, targets, statistics=True)
    for name, value in exact(logits, targets).items():
        torch.testing.assert_close(got[name].to(value.dtype), value, rtol=2e-6, atol=2e-6, msg=name)


@on_devices
def test_vocabulary_that_is_masked_out(device):
    """Entries of -inf, also the first ones, have probability 0 and no gradient."""
    logits, targets = draw(9, 9000, 3.0, torch.float32, device)
    logits[2:, :5000] = float("-inf")
    logits[3, 8999] = float("-inf")
    targets[2:] = 6000
    expected = exact(logits, targets)
    logits.requires_grad_()
    got = token_scores(logits, targets, statistics=True)
    for name in ("token_logps", "entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=3e-6, atol=3e-6, msg=name)
    (gradient,) = torch.autograd.grad(got["token_logps"].sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[2:, :5000].any()


@on_devices
def test_no_tokens(device):
    logits, targets = (
        torch.zeros(0, 11, device=device, requires_grad=True),
        torch.zeros(0, dtype=torch.long, device=device),
    )
    scores = token_scores(logits, targets, statistics=True)
    assert all(len(value) == 0 for value in scores.values())
    (gradient,) = torch.autograd.grad(scores["token_logps"].sum(), logits)
    assert gradient.shape == (0, 11)


@on_devices
def test_logits_that_lie_apart(device):
    """Rows of a wider table, and columns in place of rows."""
    table = torch.randn(12, 30, device=device)
    targets = torch.arange(12, device=device)
    for logits in (table[:, 5:25], table.T[:12, :12].T):
        got = token_scores(logits, targets % logits.shape[1], statistics=True)
        for name, value in exact(logits.contiguous(), targets % logits.shape[1]).items():
            torch.testing.assert_close(got[name].to(value.dtype), value, rtol=3e-6, atol=3e-6)
