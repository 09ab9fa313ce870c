"""`CPOTrainer` (CPO, SimPO, CPO-SimPO, AlphaPO): TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

import torch
import trl.experimental.cpo

from preftree.objectives import CPO_LOSSES, PER_TOKEN, LikelihoodOptions, implicit_rewards
from preftree.trainers.config import CPOConfig
from preftree.trainers.likelihood import LikelihoodTrainer
from preftree.trainers.metrics import Metrics
from preftree.trainers.step import MicroBatch, Terms, mean_nll, pairs_without_reference


class CPOTrainer(LikelihoodTrainer, trl.experimental.cpo.CPOTrainer):
    """TRL's `CPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    ``loss_type="simpo"`` is SimPO, with ``cpo_alpha=0`` the paper's (TRL's default of 1 adds a likelihood term: CPO-SimPO);
    ``alpha`` other than 0 is AlphaPO. Ranked data (`prompt`, `completions`, `scores` or `ranks`) are taken too.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`).
        ValueError: for bad data, naming row and field, for a reference model, and for weights that are not finite.
    """

    config_class = CPOConfig

    @property
    def _options(self) -> LikelihoodOptions:
        return LikelihoodOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.args.simpo_gamma,
            alpha=self.alpha,
        )

    @property
    def _by_example(self) -> bool:
        return not self.cpo_alpha  # (which weighs a mean over tokens, a rank's in TRL)

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        losses = CPO_LOSSES[self.loss_type](pairs_without_reference(terms), self._options)
        loss = self._weighted_sum(batch, terms, losses)
        return loss + self.cpo_alpha * mean_nll(batch, terms, "chosen") if self.cpo_alpha else loss

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        pairs, per_token = pairs_without_reference(batch), self.loss_type in PER_TOKEN
        logps = implicit_rewards(pairs, per_token, LikelihoodOptions())
        chosen, rejected = implicit_rewards(pairs, per_token, self._options)
        rewards = self.beta * chosen, self.beta * rejected
        return self._likelihood_metrics(batch, rewards, logps, "chosen" if self.cpo_alpha else None)
