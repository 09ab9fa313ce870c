"""`DPOTrainer`: TRL's, with the prompt of each pair computed once."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, hash_module, use_adapter

from preftree.logprobs import sequence_logps
from preftree.models import prepare_model, prepared_part
from preftree.models.refusals import active_dropout, disable_dropout
from preftree.objectives import DPO_LOSSES, MIXING, DPOOptions, load_balancing
from preftree.packing import PackedRow, empty_row
from preftree.trainers import reference
from preftree.trainers.checks import PairCheck, check_columns, check_weights, prepare_pairs, vocabulary_of
from preftree.trainers.collator import TreeCollator
from preftree.trainers.config import DPOConfig, upgrade
from preftree.trainers.step import (
    Gradient,
    MicroBatch,
    Terms,
    by_side,
    metrics,
    pairs_of,
    statistics,
    weighted_logps,
    wpo_weights,
)
from preftree.version import __version__


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer` with the same arguments, columns, defaults, losses and metrics; prompts are computed once.

    A micro-batch's pairs are packed into rows (`DPOConfig.row_length`), which run one after the other; their gradients
    add up to those of TRL's padded batch. Everything else (data preparation, accumulation, evaluation, checkpoints,
    distribution, logging) is TRL's and transformers' own.

    Raises:
        NotImplementedError: for a model or setting that cannot be computed exactly (see `preftree.prepare_model`), and
            for images.
        ValueError: for bad data, naming row and field, and for weights that are not finite.
    """

    model: Any
    args: Any

    def __init__(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        elif not isinstance(args, DPOConfig):
            args = upgrade(args)
        if args.neftune_noise_alpha is not None:
            raise NotImplementedError(
                f"neftune_noise_alpha={args.neftune_noise_alpha}: a shared prefix would get one noise where separate "
                "sequences get several, of a size that depends on the padded length; leave it unset"
            )
        for part, name in ((model, "model"), (ref_model, "ref_model")):
            if isinstance(part, torch.nn.Module):
                check_weights(part, name)
        if train_dataset is not None and (sample := next(iter(train_dataset), None)) is not None:
            check_columns(sample, "train dataset")
        # TRL's constructor already computes reference log-probabilities, so what that needs is set before it runs.
        self._vocabulary = vocabulary_of(model, args)
        self._user_collator = data_collator is not None
        self._batch: MicroBatch | None = None
        # What training has computed so far on this rank: pairs, rows, row_tokens (padding included), tokens, and
        # unshared_tokens (what the same sequences hold one by one).
        self.computed: Counter[str] = Counter()
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            **kwargs,
        )
        if isinstance(model, str):
            check_weights(self.model, "model")
        self._prepare_for_trees()

    # ------------------------------------------------------------------------------------------------ preparation

    def _prepare_for_trees(self) -> None:
        """Prepare policy and reference, and put the collator in place; does nothing the second time."""
        for part in (self.model, self.ref_model):
            if part is None or prepared_part(part) is not None:
                continue
            if self.args.disable_dropout:
                disable_dropout(part)
            elif (found := next(active_dropout(part), None)) is not None:
                raise ValueError(
                    f"disable_dropout=False, but {found[0] or 'the model'} has dropout {found[2]}: a shared prefix cannot "
                    "reproduce separate dropout masks"
                )
            prepare_model(self.accelerator.unwrap_model(part, keep_torch_compile=False), self.args.attention_backend)
        if not isinstance(self.data_collator, TreeCollator):
            self._padded = self.data_collator
            self._trees = TreeCollator(
                pad_token_id=self._tokenizer.pad_token_id,
                max_length=self.args.max_length,
                truncation_mode=self.args.truncation_mode,
                row_length=self.args.row_length,
                static=self.args.device.type == "cuda",
                share_prefixes=self.args.share_prefixes,
                padded=self._padded if self.compute_metrics is not None else None,
            )
            if not self._user_collator:
                self.data_collator = self._trees

    @classmethod
    def tokenize(cls, dataset: Dataset, tokenizer: Any, args: DPOConfig, vocabulary: int) -> Dataset:
        """A data set checked and tokenised as for training, without a model: adds `prompt_ids`, `chosen_ids`, `rejected_ids`.

        Raises:
            ValueError: for bad data, naming row and field.
        """
        trainer = cls.__new__(cls)
        trainer._tokenizer, trainer._vocabulary = tokenizer, vocabulary
        return trainer._prepare_dataset(dataset, tokenizer, args, "train")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        source = f"{dataset_name} dataset"
        if dataset.info.dataset_name:
            source += f" ({dataset.info.dataset_name})"
        check = PairCheck(
            source,
            vocabulary=self._vocabulary,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            row_length=args.row_length,
            overlong=args.overlong,
            share_prefixes=args.share_prefixes,
        )
        # TRL would leave out in silence what max_length leaves no completion of; the check says which and how many.
        unlimited = copy.copy(args)
        unlimited.max_length = None
        tokenise = partial(
            super()._prepare_dataset, processing_class=processing_class, args=unlimited, dataset_name=dataset_name
        )
        chat_template = getattr(processing_class, "chat_template", None) is not None
        return prepare_pairs(dataset, tokenise, check, chat_template)

    # ------------------------------------------------------------------------------------------------------ steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        batch = self._batch = self._micro_batch(inputs)
        if len(batch.rows) > 1 and (self.aux_loss_enabled or MIXING.intersection(self.loss_types)):
            # The loss is no sum over rows: a first pass without gradients finds its gradient by what they add up to.
            with torch.no_grad():
                whole = self._run(model, batch)
            batch.gradient = Gradient.of(partial(self._loss, batch), whole)
        loss = torch.zeros((), device=self.args.device)
        for number, row in enumerate(batch.rows):
            # Gradients are exchanged between ranks once, with the last row.
            last = number == len(batch.rows) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, {"row": row}, num_items_in_batch)
        if batch.gradient is not None:
            loss = batch.gradient.loss / self.current_gradient_accumulation_steps
        self._log_metrics(batch, "train")
        self._count(batch)
        self._batch = None
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        if "row" in inputs and self._batch is not None:
            return self._row_loss(model, self._batch, inputs["row"])
        batch = self._micro_batch(inputs)
        loss = self._loss(batch, self._run(model, batch))
        self._log_metrics(batch, "train" if self.model.training else "eval")
        if not return_outputs:
            return loss
        warnings.warn(
            "`compute_metrics` and `predict` are given the logits of whole sequences, which are computed for them with an "
            "extra, unshared forward pass.",
            FutureWarning,
            stacklevel=2,
        )
        padded = inputs["padded"]
        with torch.no_grad():
            outputs = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False)
        inputs["input_ids"] = padded["input_ids"]  # `prediction_step` hands these to compute_metrics as labels
        return loss, outputs

    def predict(self, *args, **kwargs):
        # Predictions are logits of whole sequences: batches must hold these too.
        given, self._trees.padded = self._trees.padded, self._padded
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._trees.padded = given

    def _micro_batch(self, inputs) -> MicroBatch:
        if "rows" not in inputs:  # a collator of the user's, in TRL's padded format
            inputs.update(self._trees.from_padded(inputs))
        batch = MicroBatch.from_inputs(self._prepare_inputs(inputs))
        if self.args.world_size > 1:
            # The same number of forward passes on every rank, or collectives inside the model would wait for ever.
            count = torch.tensor([len(batch.rows)], device=self.args.device)
            most = int(self.accelerator.gather(count).max())
            spare = [empty_row(len(batch.rows[0]), self._tokenizer.pad_token_id) for _ in range(most - len(batch.rows))]
            batch.rows = [*spare, *batch.rows]
        return batch

    def _row_loss(self, model, batch: MicroBatch, row: PackedRow) -> torch.Tensor:
        """The row's share of the micro-batch's loss."""
        if batch.gradient is None:
            return self._loss(batch, self._terms(model, batch, row))
        out = sequence_logps(model, row, experts=self.aux_loss_enabled)
        return batch.gradient.linear(row.to(self.args.device), out, weighted_logps(out, self.ld_alpha))

    def _run(self, model, batch: MicroBatch) -> Terms:
        """The terms of all rows, as those of the whole micro-batch."""
        return Terms.join(batch.rows, [self._terms(model, batch, row) for row in batch.rows])

    def _terms(self, model, batch: MicroBatch, row: PackedRow) -> Terms:
        """Policy and reference on one row; what metrics need goes into the micro-batch's record."""
        out = sequence_logps(model, row, statistics=True, experts=self.aux_loss_enabled)
        row = row.to(self.args.device)
        terms = Terms(
            lengths=row.completion_lengths,
            logps=weighted_logps(out, self.ld_alpha),
            plain=out.logps,
            ref=self._reference_logps(row, batch),
            weights=wpo_weights(out) if self.use_weighting else None,
            expert_counts=out.expert_counts,
            expert_probs=out.expert_probs,
        )
        batch.record(row, logps=terms.logps, ref=terms.ref, **statistics(out))
        return terms

    def _loss(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        """The share of these sequences in the micro-batch's loss: a mean over its pairs, weighted over the loss types."""
        pairs = pairs_of(batch, terms)
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
        if terms.weights is not None:
            total = total * torch.mul(*by_side(terms.weights))
        loss = total.sum() / batch.pairs
        if terms.expert_counts is not None and terms.expert_probs is not None:
            aux_loss = load_balancing(terms.expert_counts, terms.expert_probs)
            batch.aux_loss = aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * aux_loss
        return loss

    # -------------------------------------------------------------------------------------------------- reference

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[torch.nn.Module]:
        """The reference: a second model, or the policy with its adapter off (or the adapter it started from on)."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            stack.enter_context(self.accelerator.autocast())
            model = self.ref_model
            if model is None:
                model = self.model
                peft_model = self.accelerator.unwrap_model(self.model)
                if hasattr(peft_model, "disable_adapter"):
                    adapter = "ref" if "ref" in peft_model.peft_config else None
                    stack.enter_context(use_adapter(peft_model, adapter_name=adapter))
            yield model

    def _reference_logps(self, row: PackedRow, batch: MicroBatch | None) -> torch.Tensor:
        """The reference's log-probabilities of the row's sequences ``[n]``, cached ones where the data have them."""
        if batch is not None and self.precompute_ref_logps:
            if batch.given_reference is None:
                raise ValueError(
                    "precompute_ref_log_probs=True, but the batch has no ref_chosen_logps and ref_rejected_logps: a "
                    "data collator must hand these columns on"
                )
            return batch.given_reference.to(self.args.device)[row.sequence_ids]
        with self._as_reference() as model:
            return weighted_logps(sequence_logps(model, row), self.ld_alpha)

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a collated batch: ``(chosen [pairs], rejected [pairs])``."""
        batch = self._micro_batch(dict(inputs))
        for row in batch.rows:
            row = row.to(self.args.device)
            values = self._reference_logps(row, None)
            if row.num_sequences:
                batch.record(row, ref=values)
        return batch.by_side("ref")

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # raises
        self._prepare_for_trees()
        args = self.args
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        settings = {
            "config": reference.arithmetic_of(model.config),
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "ld_alpha": self.ld_alpha,
            "precision": self.accelerator.mixed_precision,
            "dtype": str(next(model.parameters()).dtype),
            "device": args.device.type,
            "versions": [__version__, torch.__version__],
        }
        examples = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        key = reference.content_key(self._precompute_model_hash or hash_module(model), examples, settings)
        path = Path(args.ref_logps_cache_dir or reference.default_directory()) / f"{key}.safetensors"
        columns = reference.load(path, key, len(dataset))
        if columns is None:
            columns = self._run_reference(examples, name, batch_size)
            if self.accelerator.is_main_process:
                reference.save(path, key, columns)
            self.accelerator.wait_for_everyone()
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset

    def _run_reference(self, examples: Dataset, name: str, batch_size: int) -> dict[str, torch.Tensor]:
        loader = torch.utils.data.DataLoader(
            examples,
            batch_size=batch_size,
            collate_fn=self._trees,
            num_workers=self.args.dataloader_num_workers,
            shuffle=False,
        )
        loader = self.accelerator.prepare(loader)
        chosen, rejected = [], []
        was_training = self.model.training
        self.model.eval()
        for inputs in tqdm(loader, desc=f"Computing reference log probs for {name} dataset"):
            sides = self.accelerator.gather_for_metrics(
                self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            )
            chosen.append(sides[0])
            rejected.append(sides[1])
        self.model.train(was_training)
        return reference.columns_of(chosen, rejected)

    # ---------------------------------------------------------------------------------------------------- metrics

    def _count(self, batch: MicroBatch) -> None:
        """Count what training computes, and would compute unshared, on this rank."""
        self.computed["pairs"] += batch.pairs
        self.computed["rows"] += len(batch.rows)
        self.computed["row_tokens"] += sum(len(row) for row in batch.rows)
        self.computed["tokens"] += sum(row.num_tokens for row in batch.rows)
        self.computed["unshared_tokens"] += batch.num_tokens

    def _log_metrics(self, batch: MicroBatch, mode: str) -> None:
        for name, value in metrics(batch, self.beta, self.accelerator.gather).items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += self._over_ranks(batch.num_tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _over_ranks(self, count: int) -> int:
        """Sum of a number over all ranks."""
        return int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).sum())

    def _track_num_input_tokens(self, inputs) -> None:
        """`include_num_input_tokens_seen`: the tokens of TRL's padded batch, or ("non_padding") of its sequences."""
        if "rows" not in inputs or self.args.include_num_input_tokens_seen == "no":
            return super()._track_num_input_tokens(inputs)
        count = inputs["num_tokens"]
        if self.args.include_num_input_tokens_seen != "non_padding":
            longest = max(int(row.sequence_lengths.max()) for row in inputs["rows"])
            multiple = getattr(self._padded, "pad_to_multiple_of", None) or 1
            count = 2 * len(inputs["index"]) * -(-longest // multiple) * multiple
        self.state.num_input_tokens_seen += self._over_ranks(count)
        return None

    def floating_point_ops(self, inputs) -> int:
        """6 operations per parameter and computed token; attention's own are left out, as transformers does."""
        if "rows" not in inputs:
            return super().floating_point_ops(inputs)
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return 6 * sum(row.num_tokens for row in inputs["rows"]) * model.num_parameters(exclude_embeddings=True)
