"""`KTOTrainer`: TRL's, with the prompt of a prompt's answers computed once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset

from preftree.logprobs import sequence_logps
from preftree.objectives import KTO_LOSSES, KTOOptions, kl_estimate
from preftree.packing import PackedRow
from preftree.trainers.checks import check_columns, check_raw
from preftree.trainers.collator import TreeCollator
from preftree.trainers.columns import PAIR_FIELDS, ROW, columns_of, source_of
from preftree.trainers.config import KTOConfig
from preftree.trainers.groups import Layout
from preftree.trainers.metrics import Metrics, difference_if_any, entropy, mean_of_ranks, ratio_if_any
from preftree.trainers.referenced import ReferencedTrainer
from preftree.trainers.step import MicroBatch, Terms

logger = logging.getLogger(__name__)


@dataclass
class KTOCollator(TreeCollator):
    """Adds under "kl" the batch of mismatched completions from which the KL term is estimated."""

    mismatched: TreeCollator | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        if self.mismatched is not None:
            batch["kl"] = self.mismatched(examples)
        return batch

    def from_padded(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        result = super().from_padded(batch)
        if self.mismatched is not None:
            renamed = {name.removeprefix("KL_"): value for name, value in batch.items() if name.startswith("KL_")}
            result["kl"] = self.mismatched.from_padded({**batch, **renamed})
        return result


class KTOTrainer(ReferencedTrainer, trl.KTOTrainer):
    """TRL's `KTOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    Answers to one prompt are kept together (`KTOConfig.keep_prompts_together`): data in pairs become one example behind
    the other, data in single rows are brought into that order. So for data in pairs the examples come in another order
    than TRL's, which takes a thousand chosen answers and then their thousand rejected ones.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`), and
            for images.
        ValueError: for bad data, naming row and field, and for prompts with a single answer.
    """

    config_class = KTOConfig
    fields = ("completion",)
    takes_ranked = False
    columns = ("label",)
    reference_columns = ("ref_logps",)

    @classmethod
    def layout(cls, args: Any) -> Layout:
        return Layout(sides=("completion",), max_length=args.max_length)

    def _make_collator(self) -> TreeCollator:
        plain = super()._make_collator()
        mismatched = None
        if self.calculate_KL:
            layout = replace(plain.layout, sides=("KL_completion",))
            mismatched = replace(plain, layout=layout, columns=(), reference_columns=("ref_KL_logps",), padded=None)
        return KTOCollator(**vars(plain), mismatched=mismatched)

    # ------------------------------------------------------------------------------------------------ preparation

    @classmethod
    def text_fields(cls, columns: Iterable[str] | None, source: str) -> tuple[str, ...]:
        columns = list(columns or ())
        paired = "chosen" in columns or "rejected" in columns
        check_columns(columns, source, PAIR_FIELDS if paired else ("prompt", "completion", "label"), ranked=False)
        return PAIR_FIELDS if paired else ("completion",)

    def _raw(self, dataset, processing_class, args, dataset_name):
        source, columns = source_of(dataset, dataset_name), columns_of(dataset)
        fields, paired = self.text_fields(columns, source), "chosen" in columns
        checked = check_raw(dataset, source, processing_class, fields)
        if not paired and isinstance(checked, Dataset):
            _check_labels(checked, source)
        if not args.keep_prompts_together:
            return checked
        if paired:
            if "prompt" not in columns:
                checked = checked.map(trl.extract_prompt)
            return _in_order(_one_by_one(checked))
        if isinstance(checked, IterableDataset):
            raise ValueError(
                f"{source}: a stream of single answers cannot be put in the order of its prompts: give pairs "
                "('chosen', 'rejected'), or set keep_prompts_together=False"
            )
        return _in_order(checked, source)

    def _construct(self, given: dict[str, Any]) -> None:
        super()._construct(given)
        size, data = self.args.per_device_train_batch_size, self.train_dataset
        if not self.args.keep_prompts_together or not isinstance(data, Dataset):
            return
        apart = sum(data[i - 1]["prompt_ids"] == data[i]["prompt_ids"] for i in range(size, len(data), size))
        if apart:
            logger.warning(
                "%d prompts have answers in two micro-batches and are computed in each: let per_device_train_batch_size=%d "
                "be a multiple of the answers to a prompt",
                apart,
                size,
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Mismatched completions are those of a batch's other examples, as they stand once examples are left out.
        asked, self.calculate_KL = self.calculate_KL, False
        try:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            self.calculate_KL = asked
        if not asked:
            return prepared

        def rotated(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            completions = examples["completion_ids"]
            return {"KL_completion_ids": completions[-1:] + completions[:-1]}

        return prepared.map(rotated, batched=True, batch_size=args.per_device_train_batch_size)

    # -------------------------------------------------------------------------------------------------- reference

    def _columns_of_reference(self, dataset: Dataset) -> list[str]:
        names = super()._columns_of_reference(dataset)
        return [*names, "KL_completion_ids"] if self.calculate_KL else names

    def _reference_columns(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        columns = {"ref_logps": torch.cat(self._reference_of(self._micro_batch(dict(inputs))))}
        if self.calculate_KL:
            kl_batch = self._micro_batch(inputs["kl"])
            columns["ref_KL_logps"] = torch.cat(self._reference_of(kl_batch))
        return columns

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a collated batch, ``[examples]``, and of its mismatched completions."""
        columns = self._reference_columns(inputs)
        return columns["ref_logps"], columns.get("ref_KL_logps")

    # ------------------------------------------------------------------------------------------------------ losses

    def _begin(self, model, batch: MicroBatch, inputs: Mapping[str, Any]) -> None:
        """The KL term of the micro-batch, which every example's loss needs."""
        batch.scalars["kl"] = torch.zeros((), device=self.args.device)
        if not self.calculate_KL:
            return
        kl_batch = self._mismatched = self._micro_batch(inputs["kl"])
        with torch.no_grad():
            for row in kl_batch.rows:
                logps = sequence_logps(model, row).logps
                kl_batch.record(row, ratio=logps - self._reference_logps(row, kl_batch))
        # The mean over this rank's examples, then over ranks, as in TRL.
        means = self.accelerator.gather_for_metrics(kl_batch.values["ratio"].mean())
        batch.scalars["kl"] = kl_estimate(means.flatten())

    def _more_terms(self, batch: MicroBatch, row: PackedRow, out: Any) -> dict[str, torch.Tensor]:
        return {"ref": self._reference_logps(row, batch)}

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        ratio = terms.side("completion", "logps") - terms.side("completion", "ref")
        desirable = self._of_units(batch.columns["label"], terms).bool()
        options = KTOOptions(self.beta, self.desirable_weight, self.undesirable_weight)
        losses = KTO_LOSSES[self.loss_type](ratio, desirable, batch.scalars["kl"], options)
        return self._weighted_sum(batch, terms, losses)

    # ---------------------------------------------------------------------------------------------------- metrics

    def _count(self, batch: MicroBatch) -> None:
        super()._count(batch)
        if self.calculate_KL:
            super()._count(self._mismatched)

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        logps, ref = batch.side("completion", "logps"), batch.side("completion", "ref")
        tokens, logits = batch.side("completion", "tokens"), batch.side("completion", "mean_logits")
        desirable = batch.columns["label"].to(logps.device).bool()
        result: Metrics = {"kl": mean_of_ranks(batch.scalars["kl"]), "entropy": entropy(batch, ("completion",))}
        # (A micro-batch may have none of a kind.)
        for side, of_kind in (("chosen", desirable), ("rejected", ~desirable)):
            values = torch.stack((self.beta * (logps - ref), logps, logits, tokens, torch.ones_like(logps)))
            rewards, total, logit_sum, count, examples = torch.where(of_kind, values, 0.0).sum(1)
            result[f"logits/{side}"] = ratio_if_any(logit_sum, count)
            result[f"rewards/{side}"] = ratio_if_any(rewards, examples)
            result[f"logps/{side}"] = ratio_if_any(total, examples)
        result["rewards/margins"] = difference_if_any(result["rewards/chosen"], result["rewards/rejected"])
        return result


def _check_labels(dataset: Dataset, source: str) -> None:
    for index, label in enumerate(dataset["label"]):
        if label not in (True, False):
            raise ValueError(f"{source}, row {index}, field 'label': {label!r} is neither true nor false")


def _one_by_one(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Pairs as single answers, the rejected one behind the chosen one."""

    def answers(pairs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen, rejected = pairs.pop("chosen"), pairs.pop("rejected")
        rows = {name: [value for value in values for _ in range(2)] for name, values in pairs.items()}
        rows["completion"] = [answer for pair in zip(chosen, rejected, strict=True) for answer in pair]
        rows["label"] = [True, False] * len(chosen)
        return rows

    return dataset.map(answers, batched=True, remove_columns=columns_of(dataset))


def _in_order(dataset: Dataset | IterableDataset, source: str | None = None) -> Dataset | IterableDataset:
    """Single answers in the order of their prompts' first appearance.

    Args:
        source: the data's name, to say which prompts have a single answer; None for data that were pairs.
    """
    if isinstance(dataset, IterableDataset):
        return dataset
    rows_of: dict[str, list[int]] = {}
    for index, prompt in enumerate(dataset["prompt"]):
        rows_of.setdefault(json.dumps(prompt, sort_keys=True), []).append(index)
    alone = [rows[0] for rows in rows_of.values() if len(rows) == 1]
    if source is not None and alone:
        raise ValueError(
            f"{source}, row {dataset[alone[0]][ROW]}, field 'prompt': it has a single answer, as have {len(alone)} of "
            f"{len(rows_of)} prompts: there is no prefix to share. Give data whose prompts have several answers, or set "
            "keep_prompts_together=False to train on them in their own order all the same"
        )
    order = [index for rows in rows_of.values() for index in rows]
    return dataset if order == sorted(order) else dataset.select(order)
