"""`DPOTrainer`: TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

from typing import Any

import torch
import trl
from transformers import ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from preftree.objectives import DPO_LOSSES, MIXING, DPOOptions, Pairs, plackett_luce
from preftree.packing import PackedRow
from preftree.trainers.config import LIST_LOSS, DPOConfig
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, entropy, logit_metrics, pair_metrics, token_mean
from preftree.trainers.referenced import ReferencedTrainer
from preftree.trainers.step import MicroBatch, Terms, weighted_logps, wpo_weights
from preftree.trainers.vision import ImageReader, holds_images, image_token_ids


class DPOTrainer(ReferencedTrainer, trl.DPOTrainer):
    """TRL's `DPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    It also takes ranked data (`prompt`, `completions`, `scores` or `ranks`): all ordered pairs of a prompt's responses,
    or with ``loss_type="plackett_luce"`` the list objective, from one tree. Prompts may have images (columns `image` or
    `images`, as TRL takes them), which are looked at once for each tree; with these, too, the reference's log-probabilities
    may be precomputed.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`), and
            for images with ranked data or a data collator of one's own.
        ValueError: for bad data, naming row and field, for weights that are not finite, and for options that exclude
            each other.
    """

    config_class = DPOConfig
    takes_images = True
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    @property
    def _is_vision_dataset(self) -> bool:
        """False, whatever TRL sets: data with images take the way of all others here, prepared, evaluated and cached."""
        return False

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, found: bool) -> None:
        self._has_images = self._has_images or found

    def _check_arguments(self, given: dict[str, Any]) -> None:
        super()._check_arguments(given)
        train_dataset, args = given.get("train_dataset"), given["args"]
        sample = None if train_dataset is None else next(iter(train_dataset), None)
        if sample is None or not holds_images(sample):
            return
        if given.get("data_collator") is not None:
            raise NotImplementedError("data_collator: images are collated by this trainer: leave it out")
        if args.max_length is not None and args.truncation_mode == "keep_end":
            raise ValueError(
                "truncation_mode='keep_end' would cut off images, which stand in the prompt: use 'keep_start', or set "
                "max_length=None"
            )
        if args.row_length == "auto":
            raise NotImplementedError(
                "row_length='auto' does not know what memory images take: give a number, or leave it out"
            )
        if args.overlong == "drop":
            raise NotImplementedError(
                "overlong='drop': how long examples with images are is not known before training: use 'truncate' or 'error'"
            )

    def _make_reader(self) -> ImageReader | None:
        processor: Any = self.processing_class
        if not isinstance(processor, ProcessorMixin):
            return None
        return ImageReader(
            DataCollatorForVisionPreference(processor),
            self.layout(self.args),
            image_token_ids(processor, self.model.config),
            refuses_longer=self.args.overlong == "error",
        )

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

    @property
    def _by_example(self) -> bool:
        # ("sft" is a mean over tokens, a rank's in TRL.)
        return self._additive and not {LIST_LOSS, "sft"}.intersection(self.loss_types)

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
            tokens_per_chosen=batch.tokens["chosen"] / max(batch.units, 1),
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
        chosen, rejected = batch.side("chosen", "logps"), batch.side("rejected", "logps")
        return {
            "entropy": entropy(batch),
            "mean_token_accuracy": token_mean(batch, "chosen", "top1"),
            **logit_metrics(batch),
            **pair_metrics(
                self.beta * (chosen - batch.side("chosen", "ref")),
                self.beta * (rejected - batch.side("rejected", "ref")),
                chosen,
                rejected,
            ),
        }

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a collated batch: ``(chosen [pairs], rejected [pairs])``."""
        batch = self._micro_batch(dict(inputs))
        self._reference_of(batch)
        return batch.side("chosen", "ref"), batch.side("rejected", "ref")
