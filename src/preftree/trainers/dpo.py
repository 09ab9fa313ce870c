"""`DPOTrainer`: TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

from typing import Any

import torch
import trl

from preftree.objectives import DPO_LOSSES, MIXING, DPOOptions, Pairs, plackett_luce
from preftree.packing import PackedRow
from preftree.trainers.config import LIST_LOSS, DPOConfig
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, entropy, logit_metrics, pair_metrics, token_mean
from preftree.trainers.referenced import ReferencedTrainer
from preftree.trainers.step import MicroBatch, Terms, weighted_logps, wpo_weights


class DPOTrainer(ReferencedTrainer, trl.DPOTrainer):
    """TRL's `DPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    It also takes ranked data (`prompt`, `completions`, `scores` or `ranks`): all ordered pairs of a prompt's responses,
    or with ``loss_type="plackett_luce"`` the list objective, from one tree.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`), and
            for images.
        ValueError: for bad data, naming row and field, for weights that are not finite, and for options that exclude
            each other.
    """

    config_class = DPOConfig
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    @classmethod
    def layout(cls, args: Any) -> Layout:
        return Layout(
            weighting=args.pair_weighting,
            per_pair=args.ld_alpha is not None,
            lists=LIST_LOSS in args.loss_type,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
        )

    @property
    def _additive(self) -> bool:
        return not MIXING.intersection(self.loss_types)

    def _policy_terms(self, row: PackedRow, out: Any) -> dict[str, torch.Tensor]:
        return {
            "logps": weighted_logps(out, self.ld_alpha),
            "plain": out.logps,
            "lengths": row.completion_lengths,
        }

    def _more_terms(self, batch: MicroBatch, row: PackedRow, out: Any) -> dict[str, torch.Tensor]:
        terms = {"ref": self._reference_logps(row, batch)}
        return terms | ({"weights": wpo_weights(out)} if self.use_weighting else {})

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        if LIST_LOSS in self.loss_types:
            order = terms.members["ranking"]
            ratio = (terms.values["logps"] - terms.values["ref"])[order]
            return plackett_luce(ratio, terms.members["sizes"].tolist(), self.beta).sum() / batch.lists
        pairs = Pairs(
            chosen=terms.side("chosen", "logps"),
            rejected=terms.side("rejected", "logps"),
            ref_chosen=terms.side("chosen", "ref"),
            ref_rejected=terms.side("rejected", "ref"),
            chosen_lengths=terms.side("chosen", "lengths"),
            rejected_lengths=terms.side("rejected", "lengths"),
            chosen_plain=terms.side("chosen", "plain"),
            tokens_per_chosen=batch.tokens["chosen"] / batch.units,
        )
        options = DPOOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.args.discopop_tau,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
        )
        total = torch.zeros_like(pairs.chosen)
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            total = total + weight * DPO_LOSSES[name](pairs, options)
        if self.use_weighting:
            total = total * terms.side("chosen", "weights") * terms.side("rejected", "weights")
        return self._weighted_sum(batch, terms, total)

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        gather = self.accelerator.gather
        chosen, rejected = batch.side("chosen", "logps"), batch.side("rejected", "logps")
        return {
            "entropy": entropy(batch, gather),
            "mean_token_accuracy": token_mean(batch, "chosen", "top1", gather),
            **logit_metrics(batch, gather),
            **pair_metrics(
                self.beta * (chosen - batch.side("chosen", "ref")),
                self.beta * (rejected - batch.side("rejected", "ref")),
                chosen,
                rejected,
                gather,
            ),
        }

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a collated batch: ``(chosen [pairs], rejected [pairs])``."""
        batch = self._micro_batch(dict(inputs))
        self._reference_of(batch)
        return batch.side("chosen", "ref"), batch.side("rejected", "ref")
