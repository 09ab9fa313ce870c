"""`RewardTrainer`: TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import trl
from transformers.modeling_outputs import SequenceClassifierOutput

from preftree.objectives import bradley_terry
from preftree.rewards import sequence_rewards
from preftree.trainers.base import TreeTrainer
from preftree.trainers.config import RewardConfig
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, largest, mean, smallest
from preftree.trainers.step import MicroBatch, Terms


class RewardTrainer(TreeTrainer, trl.RewardTrainer):
    """TRL's `RewardTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    As in TRL, a sequence's reward is read at its last token that is not the padding token; where that is the end-of-text
    token (a tokenizer without a padding token), before the final end of text. Ranked data (`prompt`, `completions`,
    `scores` or `ranks`) are taken too.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`).
        ValueError: for bad data, naming row and field, for a reference model, and for weights that are not finite.
    """

    config_class = RewardConfig
    columns = ("margin",)
    cuts_at_max_length = False
    predicts_logits = False
    extracts_prompt = False

    @property
    def _by_example(self) -> bool:
        return True

    @classmethod
    def layout(cls, args: Any) -> Layout:
        return Layout(form="whole", weighting=args.pair_weighting, max_length=args.max_length)

    @classmethod
    def text_fields(cls, columns: Iterable[str] | None, source: str) -> tuple[str, ...]:
        columns = list(columns or ())
        if "completions" in columns and "margin" in columns:
            raise ValueError(f"{source}: column 'margin' is about one pair, but ranked data make several of a row")
        return super().text_fields(columns, source)

    def _vocabulary_of(self, given: dict[str, Any]) -> int:
        # A cloned chat template may bring tokens of its own, which TRL's constructor makes room for.
        return sys.maxsize if given["args"].chat_template_path else super()._vocabulary_of(given)

    def _terms(self, model, batch: MicroBatch, number: int, again: bool = False) -> Terms:
        rewards = sequence_rewards(model, batch.rows[number])
        if not again:
            batch.record(batch.rows[number], rewards=rewards)
        return Terms(batch.members[number], {"rewards": rewards})

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        chosen, rejected = terms.side("chosen", "rewards"), terms.side("rejected", "rewards")
        margin = batch.columns.get("margin")
        if margin is not None:
            margin = self._of_units(margin, terms)
        losses = bradley_terry(chosen, rejected, margin, self.args.center_rewards_coefficient)
        return self._weighted_sum(batch, terms, losses)

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        chosen, rejected = batch.side("chosen", "rewards"), batch.side("rejected", "rewards")
        rewards = torch.cat((chosen, rejected))
        return {
            "min_reward": smallest(rewards),
            "mean_reward": mean(rewards),
            "max_reward": largest(rewards),
            "accuracy": mean((chosen > rejected).float()),
            "margin": mean(chosen - rejected),
        }

    def _outputs(self, model, inputs, batch: MicroBatch) -> SequenceClassifierOutput:
        rewards = torch.cat((batch.side("chosen", "rewards"), batch.side("rejected", "rewards")))
        return SequenceClassifierOutput(logits=rewards[:, None])
