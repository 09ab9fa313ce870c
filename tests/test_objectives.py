"""Each loss and its gradient against a formula written here in plain Python floats, extremes included."""

import dataclasses
import math

import pytest
import torch

from preftree.objectives import (
    DPO_LOSSES,
    OPTION_READERS,
    DPOOptions,
    Pairs,
    completion_weights,
    load_balancing,
    scores,
    wpo_weight,
)

BETA, EPS, TAU = 0.3, 0.1, 0.05


def ls(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x):
    return math.exp(ls(x))


FORMULAS = {
    "sigmoid": lambda a, b, m, n: -ls(BETA * (a - b)),
    "hinge": lambda a, b, m, n: max(0.0, 1 - BETA * (a - b)),
    "ipo": lambda a, b, m, n: (a / m - b / n - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda a, b, m, n: (
        s(BETA * (a - b)) * (ls(BETA * (a - b)) - math.log(1 - EPS))
        + s(-BETA * (a - b)) * (ls(-BETA * (a - b)) - math.log(EPS))
    ),
    "nca_pair": lambda a, b, m, n: -ls(BETA * a) - ls(-BETA * a) / 2 - ls(-BETA * b) / 2,
    "robust": lambda a, b, m, n: (-(1 - EPS) * ls(BETA * (a - b)) + EPS * ls(-BETA * (a - b))) / (1 - 2 * EPS),
    "bco_pair": lambda a, b, m, n: -ls(BETA * a) - ls(-BETA * b),
    "sppo_hard": lambda a, b, m, n: (a - 1 / (2 * BETA)) ** 2 + (b + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda a, b, m, n: 1 - s(BETA * a) + s(BETA * b),
    "apo_down": lambda a, b, m, n: s(BETA * a) + 1 - s(BETA * (a - b)),
    "discopop": lambda a, b, m, n: (
        -ls(BETA * (a - b)) * (1 - s(BETA * (a - b) / TAU)) + math.exp(-BETA * (a - b)) * s(BETA * (a - b) / TAU)
    ),
    "sigmoid_norm": lambda a, b, m, n: -ls(BETA * (a / m - b / n)),
}
OPTIONS = DPOOptions(beta=BETA, label_smoothing=EPS, discopop_tau=TAU)


def random_pairs(count=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return -20 + scale * torch.randn(count, generator=generator, dtype=torch.float64)

    def lengths():
        return torch.randint(1, 30, (count,), generator=generator)

    chosen = draw().requires_grad_()
    rejected = draw().requires_grad_()
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=draw(),
        ref_rejected=draw(),
        chosen_lengths=lengths(),
        rejected_lengths=lengths(),
        chosen_plain=chosen * 1.0,
        tokens_per_chosen=4.0,
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient(name):
    pairs = random_pairs()
    losses = DPO_LOSSES[name](pairs, OPTIONS)
    gradient = torch.autograd.grad(losses.sum(), (pairs.chosen, pairs.rejected), allow_unused=True)
    chosen_ratio, rejected_ratio = pairs.chosen_ratio.tolist(), pairs.rejected_ratio.tolist()
    for i in range(len(losses)):
        a, b = chosen_ratio[i], rejected_ratio[i]
        m, n = int(pairs.chosen_lengths[i]), int(pairs.rejected_lengths[i])
        formula, h = FORMULAS[name], 1e-5
        assert float(losses[i]) == pytest.approx(formula(a, b, m, n), abs=1e-9)
        by_a = (formula(a + h, b, m, n) - formula(a - h, b, m, n)) / (2 * h)
        by_b = (formula(a, b + h, m, n) - formula(a, b - h, m, n)) / (2 * h)
        assert float(gradient[0][i]) == pytest.approx(by_a, abs=1e-6, rel=1e-6)
        assert float(gradient[1][i]) == pytest.approx(by_b, abs=1e-6, rel=1e-6)


def test_every_loss_is_tested_here():
    assert set(DPO_LOSSES) == set(FORMULAS) | {"aot", "aot_unpaired", "sft"}


def test_sft_is_a_token_mean():
    pairs = random_pairs(count=4)
    # 4 scored chosen tokens a pair: the mean over pairs is the sum over tokens divided by 16.
    assert float(DPO_LOSSES["sft"](pairs, OPTIONS).mean()) == pytest.approx(-float(pairs.chosen_plain.sum()) / 16)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_sorts(name):
    pairs = random_pairs(count=6)

    def column(x):
        return x.detach().tolist()

    c, r, c0, r0 = map(column, (pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected))
    if name == "aot":
        left, right = (
            sorted(x - y for x, y in zip(c, r, strict=True)),
            sorted(x - y for x, y in zip(c0, r0, strict=True)),
        )
    else:
        left, right = (
            sorted(x - y for x, y in zip(c, c0, strict=True)),
            sorted(x - y for x, y in zip(r, r0, strict=True)),
        )
    expected = [-(1 - EPS) * ls(BETA * (x - y)) - EPS * ls(-BETA * (x - y)) for x, y in zip(left, right, strict=True)]
    assert column(DPO_LOSSES[name](pairs, OPTIONS)) == pytest.approx(expected)


DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js_divergence", 0.5)] + [
    ("alpha_divergence", alpha) for alpha in (-1.0, 0.5, 2.0)
]


def extreme_pairs(size):
    """fp32 pairs whose log-ratios are +-size or 0, in all combinations, over one token and several."""
    sides = [(a, b, n) for a in (-size, 0.0, size) for b in (-size, 0.0, size) for n in (1, 5)]
    chosen, rejected = (torch.tensor([side[i] for side in sides], requires_grad=True) for i in (0, 1))
    lengths, zero = torch.tensor([side[2] for side in sides]), torch.zeros(len(sides))
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=zero,
        ref_rejected=zero,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        chosen_plain=chosen * 1.0,
        tokens_per_chosen=4.0,
    )


@pytest.mark.parametrize("size", [45.0, 90.0, 500.0, 500 / BETA])
@pytest.mark.parametrize(("kind", "alpha"), DIVERGENCES)
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_extremes_stay_finite(name, kind, alpha, size):
    """Log-ratios and beta times log-ratios of +-500, and those whose exponentials or their squares just overflow."""
    pairs = extreme_pairs(size)
    options = DPOOptions(
        beta=BETA,
        label_smoothing=EPS,
        discopop_tau=TAU,
        f_divergence_type=kind,
        f_alpha_divergence_coef=alpha,
    )
    losses = DPO_LOSSES[name](pairs, options)
    gradients = torch.autograd.grad(
        losses.sum(), (pairs.chosen, pairs.rejected), materialize_grads=True, allow_unused=True
    )
    for values in (losses, *gradients):
        assert torch.isfinite(values).all()


def test_discopop_far_out():
    """Where the factors overflow, their product is known: -z on the wrong side, 0 on the right one; also with tau > 1."""
    pairs = extreme_pairs(500.0)
    for tau in (0.05, 0.9):
        losses = DPO_LOSSES["discopop"](pairs, DPOOptions(beta=1.0, discopop_tau=tau))
        for loss, c, r in zip(losses.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True):
            assert loss == pytest.approx(max(r - c, 0.0) if c != r else math.log(2) / 2 + 0.5, abs=1e-6)
    assert torch.isfinite(DPO_LOSSES["discopop"](pairs, DPOOptions(beta=1.0, discopop_tau=3.0))).all()


def test_scores_are_cut_where_exponentials_overflow():
    x = torch.tensor([-500.0, -79.0], requires_grad=True)
    cut, exact = scores(x, DPOOptions(f_divergence_type="forward_kl"))
    assert float(cut.detach()) == pytest.approx(-math.exp(80), rel=1e-5)
    assert float(exact.detach()) == pytest.approx(-math.exp(79), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(DPO_LOSSES) - {"sft"}))
def test_losses_name_a_missing_reference(name):
    pairs = random_pairs()
    bare = Pairs(pairs.chosen, pairs.rejected, pairs.chosen_lengths, pairs.rejected_lengths)
    with pytest.raises(ValueError, match="needs ref_chosen"):
        DPO_LOSSES[name](bare, OPTIONS)


def test_pairs_name_what_is_missing():
    pairs = random_pairs()
    bare = Pairs(
        pairs.chosen, pairs.rejected, pairs.chosen_lengths, pairs.rejected_lengths, ref_chosen=pairs.ref_chosen
    )
    with pytest.raises(ValueError, match="needs ref_rejected"):
        _ = bare.rejected_ratio
    with pytest.raises(ValueError, match="needs chosen_plain"):
        DPO_LOSSES["sft"](bare, OPTIONS)


@pytest.mark.parametrize(
    ("option", "value"), [("label_smoothing", 0.2), ("discopop_tau", 0.4), ("f_divergence_type", "js_divergence")]
)
def test_option_readers(option, value):
    """An option's readers are the losses that it changes, no others."""
    changed = {
        name
        for name, loss in DPO_LOSSES.items()
        if not torch.equal(
            loss(random_pairs(), OPTIONS), loss(random_pairs(), dataclasses.replace(OPTIONS, **{option: value}))
        )
    }
    assert OPTION_READERS[option] == changed


@pytest.mark.parametrize(
    ("kind", "f"),
    [
        ("reverse_kl", lambda x: x),
        ("forward_kl", lambda x: 1 - math.exp(-x)),
        ("js_divergence", lambda x: math.log(2) + ls(x)),
        ("alpha_divergence", lambda x: (math.exp((0.7 - 1) * x) - 1) / (0.7 - 1)),
    ],
)
def test_f_divergences(kind, f):
    pairs = random_pairs()
    options = DPOOptions(beta=BETA, f_divergence_type=kind, f_alpha_divergence_coef=0.7)
    losses = DPO_LOSSES["sigmoid"](pairs, options)
    for i in range(len(losses)):
        a, b = pairs.chosen_ratio[i].item(), pairs.rejected_ratio[i].item()
        assert float(losses[i]) == pytest.approx(-ls(BETA * (f(a) - f(b))), rel=1e-9, abs=1e-9)


def test_unknown_divergence():
    with pytest.raises(ValueError, match="unknown f_divergence_type 'kl'"):
        DPO_LOSSES["sigmoid"](random_pairs(), DPOOptions(f_divergence_type="kl"))


def test_length_desensitised_weights():
    weights = completion_weights(torch.tensor([3, 1, 2, 4]), 0.25)
    assert weights.tolist() == [1, 0.25, 0.25, 1, 1, 1, 1, 1, 0.25, 0.25]


def test_load_balancing_is_transformers_own():
    """Against the function that transformers' families share, from the routers' logits themselves."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(11, 5, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 11)
    mask[0, 7:] = 0
    expected = load_balancing_loss_func(logits, 5, 2, mask)
    counts, probs = torch.zeros(5), torch.zeros(5)
    for layer in logits:
        p = layer[:7].softmax(-1)
        probs = probs + p.sum(0)
        for token in p:
            counts[token.topk(2).indices] += 1
    got = load_balancing(counts, probs)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_weight_of_what_the_policy_would_say():
    """Two completions over a vocabulary of three, token by token."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    tokens, lengths = [0, 2, 1], torch.tensor([2, 1])
    logps = torch.stack([probs[0, 0].log() + probs[1, 2].log(), probs[2, 1].log()])
    squares = torch.stack([(probs[:2] ** 2).sum(-1).log().sum(), (probs[2] ** 2).sum().log()])
    weights = wpo_weight(logps, squares, lengths)
    p = probs.tolist()
    aligned = [p[i][token] / sum(x * x for x in p[i]) for i, token in enumerate(tokens)]
    assert weights.tolist() == pytest.approx([math.sqrt(aligned[0] * aligned[1]), aligned[2]])
    assert not weights.requires_grad
