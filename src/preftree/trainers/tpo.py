"""`TPOTrainer`: TRL's, with the prompt of the three sequences of an example computed once."""

from __future__ import annotations

from typing import Any

import torch
import trl.experimental.tpo

from preftree.objectives import PER_TOKEN, TPO_LOSSES, LikelihoodOptions, implicit_rewards
from preftree.trainers.base import TreeTrainer
from preftree.trainers.config import TPOConfig
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, entropy, logit_metrics, pair_metrics, token_mean
from preftree.trainers.step import MicroBatch, Terms, mean_nll, pairs_without_reference


class TPOTrainer(TreeTrainer, trl.experimental.tpo.TPOTrainer):
    """TRL's `TPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    `reference` is a gold answer, not a model: three sequences share a prompt (two with ``tpo_alpha=0``).

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`).
        ValueError: for bad data, naming row and field, for a reference model, and for weights that are not finite.
    """

    config_class = TPOConfig
    fields = ("chosen", "rejected", "reference")
    takes_ranked = False

    @classmethod
    def layout(cls, args: Any) -> Layout:
        sides = cls.fields if args.tpo_alpha else cls.fields[:2]
        return Layout(sides=sides, max_length=args.max_length, truncation_mode=args.truncation_mode)

    @property
    def _by_example(self) -> bool:
        return not self.tpo_alpha

    def _options(self) -> LikelihoodOptions:
        return LikelihoodOptions(self.beta, self.label_smoothing, self.tpo_l_gamma)

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        losses = TPO_LOSSES[self.loss_type](pairs_without_reference(terms), self._options())
        loss = self._weighted_sum(batch, terms, losses)
        return loss + self.tpo_alpha * mean_nll(batch, terms, "reference") if self.tpo_alpha else loss

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        per_token = self.loss_type in PER_TOKEN
        chosen, rejected = implicit_rewards(pairs_without_reference(batch), per_token, LikelihoodOptions())
        return {
            "entropy": entropy(batch, self._trees.layout.sides),
            "mean_token_accuracy": token_mean(batch, "chosen", "top1"),
            **logit_metrics(batch),
            **pair_metrics(self.beta * chosen, self.beta * rejected, chosen, rejected),
        }
