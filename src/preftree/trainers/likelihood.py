"""`LikelihoodTrainer`: what ORPO's and CPO's trainers have in common: the policy's own likelihoods, and no reference."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.utils import get_config_model_id

from preftree.trainers.base import TreeTrainer
from preftree.trainers.columns import columns_of, source_of
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, logit_metrics, mean_of_ranks, pair_metrics
from preftree.trainers.step import MicroBatch, mean_nll

# What TRL's trainers cut at if max_length is None.
_DEFAULT_MAX_LENGTH = 512


class LikelihoodTrainer(TreeTrainer):
    """On TRL's experimental trainers, which tokenise in their constructor, name their columns by `input_ids` and `labels`
    and keep their metrics in `_stored_metrics`.

    Their metrics ``logits/chosen`` and ``logits/rejected`` are means over all positions, prompt and padding included, so
    they depend on how a batch was padded. Here they are means over the completions' tokens, as in `DPOTrainer`.
    """

    predicts_logits = False

    @classmethod
    def layout(cls, args: Any) -> Layout:
        return Layout(form="labels", weighting=args.pair_weighting, max_length=args.max_length)

    @property
    def _aux_coefficient(self) -> float | None:
        return self.aux_loss_coef if self.aux_loss_enabled and self.aux_loss_coef else None

    # ------------------------------------------------------------------------------------------------ preparation

    def _check_arguments(self, given: dict[str, Any]) -> None:
        if given.get("args") is None:
            raise ValueError(f"{type(self).__name__} needs args: a {self.config_class.__name__}")
        if given.get("model_init") is not None or given.get("model") is None:
            raise NotImplementedError("model_init: give the model itself, or its name")
        if given.get("train_dataset") is None:
            raise ValueError("`train_dataset` is required")
        super()._check_arguments(given)
        for name in ("train_dataset", "eval_dataset"):
            if given.get(name) is not None and not isinstance(given[name], Dataset):
                raise ValueError(
                    f"{name}: this trainer takes a datasets.Dataset, as TRL's does, not {type(given[name]).__name__}"
                )
        if given.get("processing_class") is None:
            model, args = given["model"], given["args"]
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            given["processing_class"] = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=args.trust_remote_code
            )

    def _check_ranked_options(self, given: dict[str, Any], sample: Mapping[str, Any]) -> None:
        super()._check_ranked_options(given, sample)
        if "completions" in sample and given["args"].generate_during_eval:
            raise ValueError(
                "generate_during_eval=True takes prompts from pairs, which ranked data are not: leave it off"
            )

    def _construct(self, given: dict[str, Any]) -> None:
        args, processing_class = given["args"], given["processing_class"]
        prepared = {}
        for name, called in (("train_dataset", "train"), ("eval_dataset", "eval")):
            if (dataset := given.get(name)) is not None:
                given[name] = self._raw(dataset, processing_class, args, called)
                prepared[name] = (source_of(dataset, called), "completions" in columns_of(dataset))
        if args.max_length is None:
            args.max_length = _DEFAULT_MAX_LENGTH
        max_length = args.max_length
        if not self._user_collator:
            # Cut later, so that what is cut can be told: TRL would cut in silence, down to completions without a token.
            args.max_length = sys.maxsize
        raw = {source: given[name] for name, (source, _) in prepared.items()}
        try:
            with self._rows_named(raw, processing_class):
                super()._construct(given)
        finally:
            args.max_length = max_length
        self.max_length = max_length
        for name, (source, ranked) in prepared.items():
            setattr(self, name, self._checked(getattr(self, name), args, source, ranked))

    # ------------------------------------------------------------------------------------------------------ losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        casted = getattr(self, "_peft_has_been_casted_to_bf16", False)
        with torch.autocast(self.accelerator.device.type) if casted else contextlib.nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _outputs(self, model, inputs, batch: MicroBatch) -> Any:
        return self._numbers(self._metrics_of(batch))

    # ---------------------------------------------------------------------------------------------------- metrics

    def _likelihood_metrics(
        self,
        batch: MicroBatch,
        rewards: tuple[torch.Tensor, torch.Tensor],
        logps: tuple[torch.Tensor, torch.Tensor],
        nll_side: str | None,
    ) -> Metrics:
        """TRL's metrics of both trainers; ``nll_side`` is what the likelihood term scores, None without one."""
        nll = torch.zeros((), device=self.args.device)
        if nll_side is not None:
            nll = mean_nll(batch, batch, nll_side)
        own = self._units_of_its_own(batch)
        return {
            **pair_metrics(*(values[:own] for values in (*rewards, *logps))),
            **logit_metrics(batch),
            "nll_loss": mean_of_ranks(nll),
        }

    def _units_of_its_own(self, batch: MicroBatch) -> int:
        """How many of this rank's pairs do not repeat others, to fill up the last batch (`Accelerator.gather_for_metrics`)."""
        state = self.accelerator.gradient_state
        repeats = state.end_of_dataloader and state.remainder > 0 and not self._shares_out
        if not repeats or self.args.world_size == 1 or batch.units != batch.examples:
            return batch.units
        return min(max(state.remainder - self.args.process_index * batch.units, 0), batch.units)

    def _log_metrics(self, batch: MicroBatch, mode: str) -> None:
        self._keep_metrics(self._metrics_of(batch), mode)

    def _store_metrics(self, values: dict[str, float], mode: str) -> None:
        self.store_metrics(_named(values, mode), train_eval=mode)

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """TRL's evaluation calls this: ``(loss, metrics)`` of a collated batch."""
        micro_batch, loss = self._whole_loss(model, batch)
        return loss, _named(self._numbers(self._metrics_of(micro_batch)), train_eval)

    def evaluation_loop(self, *args, **kwargs):
        # `generate_during_eval` collates a padded batch of its own; the loop's batches are collated already.
        given, self.data_collator = self.data_collator, self._padded
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.data_collator = given


def _named(values: dict[str, float], mode: str) -> dict[str, float]:
    """Metrics by the names that TRL logs them under."""
    prefix = "eval_" if mode == "eval" else ""
    return {prefix + name: value for name, value in values.items()}
