"""Losses on likelihoods alone, unpaired examples, rewards and ranked lists: against formulas in plain Python floats."""

import dataclasses
import itertools
import math

import pytest
import torch
from test_objectives import extreme_pairs, ls, random_pairs, s

from preftree.objectives import (
    CPO_LOSSES,
    DPO_LOSSES,
    KTO_LOSSES,
    LIKELIHOOD_OPTION_READERS,
    PER_TOKEN,
    TPO_LOSSES,
    DPOOptions,
    KTOOptions,
    LikelihoodOptions,
    Pairs,
    bradley_terry,
    implicit_rewards,
    kl_estimate,
    lambda_weights,
    log_odds,
    odds_ratio,
    plackett_luce,
)

BETA, EPS, GAMMA = 0.7, 0.1, 0.4


def smoothed(margin):
    return -(1 - EPS) * ls(margin) - EPS * ls(-margin)


# Of rewards C, R: log-probabilities as the loss takes them.
FORMULAS = {
    "sigmoid": lambda C, R: smoothed(BETA * (C - R)),
    "hinge": lambda C, R: max(0.0, 1 - BETA * (C - R)),
    "ipo": lambda C, R: (C - R - 1 / (2 * BETA)) ** 2,
    "simpo": lambda C, R: smoothed(BETA * C - BETA * R - GAMMA),
}
FORMULAS["tpo-l"] = FORMULAS["simpo"]
FAMILIES = [(CPO_LOSSES, name) for name in CPO_LOSSES] + [(TPO_LOSSES, name) for name in TPO_LOSSES]


def central_difference(function, *x, h=1e-5):
    """The gradient of a function of floats."""
    return [
        (function(*x[:i], x[i] + h, *x[i + 1 :]) - function(*x[:i], x[i] - h, *x[i + 1 :])) / (2 * h)
        for i in range(len(x))
    ]


def check_pairs(losses, pairs, formula):
    """Losses and their gradients against ``formula(c, r, m, n)`` of sums and lengths, pair by pair."""
    gradients = torch.autograd.grad(losses.sum(), (pairs.chosen, pairs.rejected))
    rows = zip(
        *(x.tolist() for x in (losses, pairs.chosen, pairs.rejected, *gradients)),
        pairs.chosen_lengths.tolist(),
        pairs.rejected_lengths.tolist(),
        strict=True,
    )
    for loss, c, r, by_c, by_r, m, n in rows:
        assert loss == pytest.approx(formula(c, r, m, n), abs=1e-9)
        expected = central_difference(lambda c, r, m=m, n=n: formula(c, r, m, n), c, r)
        assert [by_c, by_r] == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
def test_likelihood_losses_and_gradients(family, name, alpha):
    pairs = random_pairs(scale=2.0)

    def formula(c, r, m, n):
        C, R = (c / m, r / n) if name in PER_TOKEN else (c, r)
        if alpha:
            C, R = (1 - math.exp(C) ** -alpha) / alpha, (1 - math.exp(R) ** -alpha) / alpha
        return FORMULAS[name](C, R)

    options = LikelihoodOptions(beta=BETA, label_smoothing=EPS, gamma=GAMMA, alpha=alpha)
    check_pairs(family[name](pairs, options), pairs, formula)


def test_families_hold_the_known_losses():
    assert {name for _, name in FAMILIES} == set(FORMULAS)
    assert set(CPO_LOSSES) == {"sigmoid", "hinge", "ipo", "simpo"}
    assert set(TPO_LOSSES) == {"sigmoid", "hinge", "ipo", "tpo-l"}


@pytest.mark.parametrize(("option", "value"), [("label_smoothing", 0.3), ("gamma", 0.9)])
def test_likelihood_option_readers(option, value):
    """An option's readers are the losses that it changes, no others."""
    options = LikelihoodOptions(BETA, EPS, GAMMA)
    other = dataclasses.replace(options, **{option: value})
    changed = {
        name
        for family, name in FAMILIES
        if not torch.equal(family[name](random_pairs(), options), family[name](random_pairs(), other))
    }
    assert LIKELIHOOD_OPTION_READERS[option] == changed


def likely_pairs():
    """fp32 pairs of averaged log-probabilities from 0 to -500, in all combinations; averages over one token and several."""
    averages = (0.0, -1e-30, -1e-9, -3e-8, -1e-3, -30.0, -500.0)
    sides = list(itertools.product(averages, averages, (1, 3)))
    lengths = torch.tensor([n for *_, n in sides])
    chosen, rejected = (torch.tensor([side[i] * side[2] for side in sides], requires_grad=True) for i in (0, 1))
    return Pairs(chosen, rejected, lengths, lengths)


def assert_finite(losses, *leaves):
    for values in (losses, *torch.autograd.grad(losses.sum(), leaves)):
        assert torch.isfinite(values).all()


@pytest.mark.parametrize(("family", "name"), FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.25, -0.5, 2.0])
def test_likelihood_extremes_stay_finite(family, name, alpha):
    pairs = likely_pairs()
    assert_finite(family[name](pairs, LikelihoodOptions(BETA, EPS, GAMMA, alpha)), pairs.chosen, pairs.rejected)


def test_implicit_rewards_of_tiny_alpha_are_log_probabilities():
    """1 - p^-alpha keeps its digits: formed from p in fp32 it would be off by percents."""
    pairs = likely_pairs()
    for per_token in (False, True):
        plain = implicit_rewards(pairs, per_token, LikelihoodOptions())
        shaped = implicit_rewards(pairs, per_token, LikelihoodOptions(alpha=1e-7))
        for x, y in zip(plain, shaped, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=0)


def test_empty_completions_have_reward_zero():
    zero = torch.zeros(1)
    pairs = Pairs(zero, zero - 8, torch.tensor([0]), torch.tensor([4]))
    assert [x.item() for x in implicit_rewards(pairs, True, LikelihoodOptions())] == [0.0, -2.0]


def test_log_odds_and_gradient():
    pairs = random_pairs()

    def formula(c, r, m, n):
        p, q = math.exp(c / m), math.exp(r / n)
        return math.log(p / (1 - p) / (q / (1 - q)))

    check_pairs(log_odds(pairs), pairs, formula)
    check_pairs(odds_ratio(pairs, BETA), pairs, lambda *x: -BETA * ls(formula(*x)))


def test_log_odds_of_certain_completions():
    """Also where exp rounds to 1: 1 - p = -log p there. An exact 1 counts as 1 - 1e-12, and has no gradient."""
    pairs = likely_pairs()
    assert_finite(log_odds(pairs), pairs.chosen, pairs.rejected)
    assert_finite(odds_ratio(pairs, BETA), pairs.chosen, pairs.rejected)
    x = torch.tensor([-1e-9, 0.0], requires_grad=True)
    ones = torch.ones(2, dtype=torch.long)
    odds = log_odds(Pairs(x, torch.full((2,), -math.log(2)), ones, ones))
    assert odds.tolist() == pytest.approx([math.log(1e9), math.log(1e12)], rel=1e-5)
    odds.sum().backward()
    assert x.grad.tolist() == pytest.approx([1e9, 0.0], rel=1e-5)


def random_examples(count=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ratio = 3 * torch.randn(count, generator=generator, dtype=torch.float64)
    return ratio.requires_grad_(), torch.randn(count, generator=generator) > 0


@pytest.mark.parametrize("name", KTO_LOSSES)
@pytest.mark.parametrize("z", [0.0, 0.8])
def test_unpaired_losses_and_gradients(name, z):
    ratio, desirable = random_examples()
    assert 0 < int(desirable.sum()) < len(desirable)
    good, bad = 1.3, 0.7

    def formula(x, wanted):
        x = x - z if name == "kto" else x
        return good * (1 - s(BETA * x)) if wanted else bad * s(BETA * x)

    kl = torch.tensor(z, dtype=torch.float64)
    losses = KTO_LOSSES[name](ratio, desirable, kl, KTOOptions(BETA, good, bad))
    (gradient,) = torch.autograd.grad(losses.sum(), ratio)
    for loss, slope, x, wanted in zip(
        losses.tolist(), gradient.tolist(), ratio.tolist(), desirable.tolist(), strict=True
    ):
        assert loss == pytest.approx(formula(x, wanted), abs=1e-12)
        assert slope == pytest.approx(central_difference(lambda x, w=wanted: formula(x, w), x)[0], abs=1e-8)


@pytest.mark.parametrize("name", KTO_LOSSES)
def test_unpaired_extremes_stay_finite(name):
    ratio = torch.tensor([-5000.0, -500.0, 0.0, 500.0, 5000.0] * 2, requires_grad=True)
    for kl in (0.0, 500.0):
        losses = KTO_LOSSES[name](ratio, torch.arange(10) < 5, torch.tensor(kl), KTOOptions(1.0))
        assert_finite(losses, ratio)


@pytest.mark.parametrize(("ratios", "expected"), [([1.0, -0.25, 3.0], 1.25), ([-2.0, 1.0], 0.0)])
def test_kl_estimate(ratios, expected):
    ratios = torch.tensor(ratios, requires_grad=True)
    kl = kl_estimate(ratios)
    assert kl.shape == ()
    assert kl.item() == expected
    assert not kl.requires_grad


def test_kl_estimate_of_nothing():
    with pytest.raises(ValueError, match="at least one mismatched completion"):
        kl_estimate(torch.zeros(0))


@pytest.mark.parametrize("coefficient", [None, 0.02])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_and_gradient(coefficient, with_margin):
    pairs = random_pairs(count=5)
    chosen, rejected = (x.detach().add(20).requires_grad_() for x in (pairs.chosen, pairs.rejected))
    margin = torch.rand(5, dtype=torch.float64) if with_margin else None
    losses = bradley_terry(chosen, rejected, margin, coefficient)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    for i, loss in enumerate(losses.tolist()):
        m = float(margin[i]) if with_margin else 0.0

        def formula(c, r, m=m):
            return -math.log(s(c - r - m)) + (coefficient or 0.0) * (c + r) ** 2

        x = chosen[i].item(), rejected[i].item()
        assert loss == pytest.approx(formula(*x), abs=1e-9)
        assert [g[i].item() for g in gradients] == pytest.approx(central_difference(formula, *x), abs=1e-6)


def test_bradley_terry_extremes_stay_finite():
    pairs = extreme_pairs(500.0)
    losses = bradley_terry(pairs.chosen, pairs.rejected, torch.full_like(pairs.chosen, 3.0), 0.01)
    assert_finite(losses, pairs.chosen, pairs.rejected)


def list_loss(x):
    """Minus the log-probability of a ranking, drawn one by one without replacement."""
    weights = [math.exp(BETA * value) for value in x]
    return -math.log(math.prod(weights[k] / sum(weights[k:]) for k in range(len(x))))


@pytest.mark.parametrize("sizes", [(3, 5, 2, 1, 4), (2,), (1,), (1, 1, 3), (6, 6)])
def test_plackett_luce_and_gradient(sizes):
    generator = torch.Generator().manual_seed(3)
    ratio = (2 * torch.randn(sum(sizes), generator=generator, dtype=torch.float64)).requires_grad_()
    losses = plackett_luce(ratio, sizes, BETA)
    (gradient,) = torch.autograd.grad(losses.sum(), ratio)
    assert losses.shape == (len(sizes),)
    for loss, x, slopes in zip(losses.tolist(), ratio.split(sizes), gradient.split(sizes), strict=True):
        assert loss == pytest.approx(list_loss(x.tolist()), abs=1e-9)
        expected = central_difference(lambda *x: list_loss(x), *x.tolist())
        assert slopes.tolist() == pytest.approx(expected, abs=1e-6)


def test_plackett_luce_of_two_is_dpo():
    pairs = random_pairs()
    ratio = torch.stack((pairs.chosen_ratio, pairs.rejected_ratio), dim=1).flatten()
    assert torch.equal(plackett_luce(ratio, [2] * 7, BETA), DPO_LOSSES["sigmoid"](pairs, DPOOptions(BETA)))


def test_plackett_luce_probabilities_sum_to_one():
    x = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    rankings = torch.cat([x[list(order)] for order in itertools.permutations(range(4))])
    assert float((-plackett_luce(rankings, [4] * 24, BETA)).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [90.0, 500.0, 5000.0])
def test_plackett_luce_extremes_stay_finite(size):
    lists = [x for n in (1, 2, 3) for x in itertools.product((-size, 0.0, size), repeat=n)]
    ratio = torch.tensor([value for x in lists for value in x], requires_grad=True)
    assert_finite(plackett_luce(ratio, [len(x) for x in lists], 1.0), ratio)


@pytest.mark.parametrize("sizes", [[2, 2], [2, 4], [5, 0], []])
def test_plackett_luce_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="add up to 5 responses"):
        plackett_luce(torch.zeros(5), sizes, BETA)


def test_lambda_weights_by_hand():
    """Scores 1, 3, 2: gains 2, 8, 4 on ranks 3, 1, 2, whose discounts are log2 4 = 2, log2 2 = 1 and log2 3."""
    second = 1 / math.log2(3)
    weights = {(better, worse): weight for better, worse, weight in lambda_weights([1.0, 3.0, 2.0])}
    assert weights == pytest.approx({(1, 2): 4 * (1 - second), (1, 0): 6 * 0.5, (2, 0): 2 * (second - 0.5)})


def test_lambda_weights_of_a_longer_list():
    scores = [0.5, -1.0, 2.0, 2.0, 0.0]
    ranks = [3, 5, 1, 2, 4]
    expected = {
        (i, j): abs(2 ** scores[i] - 2 ** scores[j])
        * abs(math.log(2) / math.log(1 + ranks[i]) - math.log(2) / math.log(1 + ranks[j]))
        for i in range(5)
        for j in range(5)
        if scores[i] > scores[j]
    }
    weights = lambda_weights(scores)
    assert {(better, worse): weight for better, worse, weight in weights} == pytest.approx(expected)
    assert len(weights) == 9
    assert all(weight > 0 for *_, weight in weights)


def test_lambda_weights_of_ties():
    assert lambda_weights([1.0, 1.0]) == []
    assert lambda_weights([4.0]) == []


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 101.0])
def test_lambda_weights_refuse_scores_without_a_gain(score):
    with pytest.raises(ValueError, match="finite and at most 100"):
        lambda_weights([0.0, score])
