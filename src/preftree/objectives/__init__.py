"""Preference objectives: pure functions from log-probabilities or rewards to one loss per pair, example or list.

Notation, per pair: ``c``, ``r`` sums of the policy's log-probabilities over the chosen and rejected completion, ``|c|``,
``|r|`` their tokens, ``c0``, ``r0`` the reference's sums; log-ratios ``a = c - c0`` and ``b = r - r0``; scores ``S =
f(log-ratio)`` with ``f`` the identity for DPO itself (see `scores`), ``D = S_c - S_r``; ``ls`` = log sigmoid, ``s`` =
sigmoid. Formulas are those of TRL's trainers; where a paper differs, the docstring says so. Tensors are ``[P]``, ``P``
pairs, unless a shape is given; fp32 in training, and results keep the dtype of what comes in.

Losses and gradients stay finite in fp32 at log-ratios and averaged log-probabilities of +-500: exponents are cut at 80
(``exp(88.8)`` overflows), and squares at ``1e36``. Neither is reached by values that a loss can still learn from.
"""

from preftree.objectives.answers import KTO_LOSSES, KTOOptions, apo_zero_unpaired, kl_estimate, kto
from preftree.objectives.dpo import (
    DIVERGENCES,
    DPO_LOSSES,
    MIXING,
    OPTION_READERS,
    DPOOptions,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust,
    scores,
    sft,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
)
from preftree.objectives.likelihood import (
    CPO_LOSSES,
    LIKELIHOOD_OPTION_READERS,
    PER_TOKEN,
    TPO_LOSSES,
    LikelihoodOptions,
    cpo_hinge,
    cpo_ipo,
    cpo_sigmoid,
    implicit_rewards,
    log_odds,
    odds_ratio,
    simpo,
)
from preftree.objectives.pairs import Pairs
from preftree.objectives.ranked import bradley_terry, lambda_weights, plackett_luce
from preftree.objectives.weights import completion_weights, load_balancing, wpo_weight

__all__ = [
    "CPO_LOSSES",
    "DIVERGENCES",
    "DPO_LOSSES",
    "KTO_LOSSES",
    "LIKELIHOOD_OPTION_READERS",
    "MIXING",
    "OPTION_READERS",
    "PER_TOKEN",
    "TPO_LOSSES",
    "DPOOptions",
    "KTOOptions",
    "LikelihoodOptions",
    "Pairs",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco_pair",
    "bradley_terry",
    "completion_weights",
    "cpo_hinge",
    "cpo_ipo",
    "cpo_sigmoid",
    "discopop",
    "exo_pair",
    "hinge",
    "implicit_rewards",
    "ipo",
    "kl_estimate",
    "kto",
    "lambda_weights",
    "load_balancing",
    "log_odds",
    "nca_pair",
    "odds_ratio",
    "plackett_luce",
    "robust",
    "scores",
    "sft",
    "sigmoid",
    "sigmoid_norm",
    "simpo",
    "sppo_hard",
    "wpo_weight",
]
