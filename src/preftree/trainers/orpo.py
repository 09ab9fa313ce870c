"""`ORPOTrainer`: TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import trl.experimental.orpo

from preftree.objectives import log_odds, odds_ratio
from preftree.trainers.config import ORPOConfig
from preftree.trainers.groups import Layout
from preftree.trainers.likelihood import LikelihoodTrainer
from preftree.trainers.metrics import Metrics, mean_of_ranks
from preftree.trainers.step import MicroBatch, Terms, mean_nll, pairs_without_reference


class ORPOTrainer(LikelihoodTrainer, trl.experimental.orpo.ORPOTrainer):
    """TRL's `ORPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    The likelihood term scores the whole chosen sequence, prompt included; the odds ratio its completion alone. Ranked
    data (`prompt`, `completions`, `scores` or `ranks`) are taken too.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`).
        ValueError: for bad data, naming row and field, for a reference model, and for weights that are not finite.
    """

    config_class = ORPOConfig

    @classmethod
    def layout(cls, args: Any) -> Layout:
        return replace(super().layout(args), whole_chosen=True)

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        losses = odds_ratio(pairs_without_reference(terms), self.beta)
        return mean_nll(batch, terms, "chosen_whole") + self._weighted_sum(batch, terms, losses)

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        pairs = pairs_without_reference(batch)
        logps = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
        rewards = self.beta * logps[0], self.beta * logps[1]
        odds = log_odds(pairs)
        # Means of each rank's means, as in TRL.
        return {
            **self._likelihood_metrics(batch, rewards, logps, "chosen_whole"),
            "log_odds_ratio": mean_of_ranks(torch.nn.functional.logsigmoid(odds).mean()),
            "log_odds_chosen": mean_of_ranks(odds.mean()),
        }
