"""Losses and gradients against TRL's own trainers, whose loss code runs on a stand-in model with given log-probabilities."""

import types
from collections import defaultdict

import pytest
import torch
import trl
from test_objectives import DIVERGENCES
from trl.trainer.utils import FusedCausalLMOutput

from preftree.objectives import (
    CPO_LOSSES,
    DPO_LOSSES,
    KTO_LOSSES,
    OPTION_READERS,
    PER_TOKEN,
    TPO_LOSSES,
    DPOOptions,
    KTOOptions,
    LikelihoodOptions,
    Pairs,
    bradley_terry,
    implicit_rewards,
    kl_estimate,
    log_odds,
    odds_ratio,
)

BETA, EPS, TAU, GAMMA = 0.3, 0.1, 0.05, 0.4


@pytest.fixture(scope="module")
def experimental():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental import cpo, orpo, tpo
    return types.SimpleNamespace(CPO=cpo.CPOTrainer, ORPO=orpo.ORPOTrainer, TPO=tpo.TPOTrainer)


def trainer(**attributes):
    """What TRL's loss methods read of a trainer on one rank."""

    def same(x):
        return x

    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        beta=BETA,
        label_smoothing=EPS,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


class Completions:
    """Random per-token log-probabilities of ``count`` sequences of unequal lengths, after prompts of unequal lengths."""

    def __init__(self, count, dtype=torch.float64, seed=0, width=13):
        generator = torch.Generator().manual_seed(seed)
        self.begins = torch.randint(1, 5, (count, 1), generator=generator)
        ends = torch.randint(6, width + 1, (count, 1), generator=generator)
        place = torch.arange(width)
        self.mask = ((place >= self.begins) & (place < ends)).long()
        self.lengths = self.mask.sum(1)
        self.ids = torch.randint(0, 11, (count, width), generator=generator)
        self.leaf = -2 * torch.rand(count, width - 1, generator=generator, dtype=dtype)
        self.leaf.requires_grad_()
        self.logps = self.leaf * self.mask[:, 1:]
        self.ref = self.logps.detach().sum(1) + 2 * torch.randn(count, generator=generator, dtype=dtype)

    def output(self):
        """What TRL's fused head returns."""
        zeros = torch.zeros_like(self.logps.detach())
        return FusedCausalLMOutput(log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def pairs(self):
        chosen, rejected = self.logps.sum(1).chunk(2)
        ref_chosen, ref_rejected = self.ref.chunk(2)
        chosen_lengths, rejected_lengths = self.lengths.chunk(2)
        return Pairs(
            chosen=chosen,
            rejected=rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_plain=chosen,
            tokens_per_chosen=float(chosen_lengths.sum()) / len(chosen),
        )


def assert_same(got, expected, leaf, tolerance=1e-6):
    """A loss and its gradient; the gradient tells apart what the losses' mean mixes."""
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (got, expected)]
    assert gradients[1].abs().max() > 0
    assert got.dtype == leaf.dtype
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


DPO_CASES = [(name, "reverse_kl", 0.5) for name in DPO_LOSSES] + [
    (name, kind, alpha)
    for kind, alpha in DIVERGENCES
    if kind != "reverse_kl"
    for name in sorted(OPTION_READERS["f_divergence_type"] | {"sft"})
]


@pytest.mark.parametrize("pairs", [1, 5])
@pytest.mark.parametrize(("name", "kind", "alpha"), DPO_CASES)
def test_dpo(name, kind, alpha, pairs):
    # TRL computes alpha divergences in fp32 at most.
    rows = Completions(2 * pairs, dtype=torch.float32 if kind == "alpha_divergence" else torch.float64)
    ref_chosen, ref_rejected = rows.ref.chunk(2)
    stand_in = trainer(
        args=types.SimpleNamespace(discopop_tau=TAU),
        ld_alpha=None,
        use_weighting=False,
        f_divergence_type=kind,
        f_alpha_divergence_coef=alpha,
        loss_types=[name],
        loss_weights=[1.0],
    )
    inputs = {
        "input_ids": rows.ids,
        "attention_mask": torch.ones_like(rows.ids),
        "completion_mask": rows.mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    expected = trl.DPOTrainer._compute_loss(stand_in, lambda **_: rows.output(), inputs, False)
    options = DPOOptions(BETA, EPS, TAU, kind, alpha)
    assert_same(DPO_LOSSES[name](rows.pairs(), options).mean(), expected, rows.leaf)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("name", CPO_LOSSES)
def test_cpo(experimental, name, alpha):
    rows = Completions(10)
    stand_in = trainer(loss_type=name, simpo_gamma=GAMMA, alpha=alpha)
    logps = rows.logps.sum(1) / (rows.lengths if name in ("ipo", "simpo") else 1)
    expected, *rewards = experimental.CPO.cpo_loss(stand_in, *logps.chunk(2))
    options = LikelihoodOptions(BETA, EPS, GAMMA, alpha)
    losses = CPO_LOSSES[name](rows.pairs(), options)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert_same(losses.sum(), expected.sum(), rows.leaf)
    for mine, theirs in zip(implicit_rewards(rows.pairs(), name in PER_TOKEN, options), rewards, strict=True):
        torch.testing.assert_close(BETA * mine.detach(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TPO_LOSSES)
def test_tpo(experimental, name):
    """From the model's logits on."""
    rows = Completions(6)
    logits = torch.randn(*rows.ids.shape, 11, dtype=torch.float64, requires_grad=True)
    stand_in = trainer(loss_type=name, tpo_l_gamma=GAMMA, tpo_alpha=0.0)
    inputs = {"input_ids": rows.ids, "attention_mask": torch.ones_like(rows.ids), "completion_mask": rows.mask}
    expected = experimental.TPO._compute_loss(stand_in, lambda **_: types.SimpleNamespace(logits=logits), inputs, False)
    tokens = logits[:, :-1].log_softmax(-1).gather(2, rows.ids[:, 1:, None])[:, :, 0]
    chosen, rejected = (tokens * rows.mask[:, 1:]).sum(1).chunk(2)
    losses = TPO_LOSSES[name](Pairs(chosen, rejected, *rows.lengths.chunk(2)), LikelihoodOptions(BETA, EPS, GAMMA))
    assert_same(losses.mean(), expected, logits)


def test_orpo(experimental):
    rows = Completions(10, dtype=torch.float32)
    expected, _, _, _, mean_log_odds = experimental.ORPO.odds_ratio_loss(
        trainer(), *(rows.logps.sum(1) / rows.lengths).chunk(2)
    )
    losses = odds_ratio(rows.pairs(), BETA)
    # TRL's losses are what it subtracts from the likelihood term.
    torch.testing.assert_close(losses, -expected, rtol=1e-6, atol=1e-6)
    assert_same(losses.sum(), -expected.sum(), rows.leaf)
    assert_same(log_odds(rows.pairs()).mean(), mean_log_odds, rows.leaf)


@pytest.mark.parametrize("shift", [-4.0, 4.0])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("name", KTO_LOSSES)
def test_kto(name, labels, shift):
    """``shift`` makes the KL estimate negative or positive."""
    rows, mismatched = Completions(5), Completions(5, seed=1)
    desirable = torch.tensor(labels, dtype=torch.bool)
    mismatched.ref -= shift
    stand_in = trainer(loss_type=name, calculate_KL=name == "kto", desirable_weight=1.3, undesirable_weight=0.7)
    stand_in._compute_kl_logps = types.MethodType(trl.KTOTrainer._compute_kl_logps, stand_in)
    inputs = {"label": desirable, "ref_logps": rows.ref, "ref_KL_logps": mismatched.ref}
    for prefix, given in (("", rows), ("KL_", mismatched)):
        inputs[prefix + "input_ids"], inputs[prefix + "completion_mask"] = given.ids, given.mask
        inputs[prefix + "attention_mask"] = torch.ones_like(given.ids)

    def model(input_ids, **_):
        return (rows if input_ids is rows.ids else mismatched).output()

    expected = trl.KTOTrainer._compute_loss(stand_in, model, inputs, False)
    kl = kl_estimate(mismatched.logps.sum(1) - mismatched.ref)
    assert (kl > 0) == (shift > 0)
    losses = KTO_LOSSES[name](rows.logps.sum(1) - rows.ref, desirable, kl, KTOOptions(BETA, 1.3, 0.7))
    assert_same(losses.mean(), expected, rows.leaf)


@pytest.mark.parametrize("coefficient", [None, 0.02])
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward(coefficient, with_margin):
    rewards = torch.randn(10, 1, dtype=torch.float64, requires_grad=True)
    inputs = {"attention_mask": torch.ones(10, 4)}
    if with_margin:
        inputs["margin"] = torch.rand(5, dtype=torch.float64)
    stand_in = trainer(args=types.SimpleNamespace(center_rewards_coefficient=coefficient))
    expected = trl.RewardTrainer.compute_loss(stand_in, lambda **_: types.SimpleNamespace(logits=rewards), dict(inputs))
    losses = bradley_terry(*rewards[:, 0].chunk(2), inputs.get("margin"), coefficient)
    assert_same(losses.mean(), expected, rewards)
