"""`TreeTrainer`: what preftree's trainers have in common. Each adds its objective, its metrics and TRL's defaults."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel
from transformers.training_args import ParallelMode
from trl.trainer.utils import get_config_model_id

from preftree.attention import may_use_flex
from preftree.logprobs import sequence_logps
from preftree.models import prepare_model, prepared_part
from preftree.models.products import adding_to_gradients
from preftree.models.refusals import active_dropout, disable_dropout
from preftree.models.rotary import rotary_limit
from preftree.objectives import load_balancing
from preftree.packing import FEW_LENGTHS, MANY_LENGTHS, PackedRow, empty_row
from preftree.trainers.balance import costs_of, share_out
from preftree.trainers.checkpoints import KeepsCheckpoints
from preftree.trainers.collator import TreeBatch, TreeCollator
from preftree.trainers.columns import IMAGE_COLUMNS, ROW, TEMPLATE_COLUMNS
from preftree.trainers.config import upgrade
from preftree.trainers.garbage import ObjectsKept
from preftree.trainers.given_model import check_weights, config_of, vocabulary_of
from preftree.trainers.groups import PAIR_WEIGHTS, RANKED_COLUMNS, RANKED_REFERENCE
from preftree.trainers.logged import LogsLate
from preftree.trainers.metrics import Metrics, mean_of_ranks
from preftree.trainers.preparation import DataPreparation
from preftree.trainers.ranks import HostExchange, adds_in_place, gradients_apart, now, to_be_continued, unchanged_since
from preftree.trainers.row_length import FitRows
from preftree.trainers.step import Gradient, MicroBatch, Terms, statistics
from preftree.trainers.vision import ImageReader

# Ranks of these gather weights together.
_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class TreeTrainer(LogsLate, KeepsCheckpoints, DataPreparation):
    """A trainer of TRL's (the class that stands behind this one among the bases) on packed rows of token trees.

    A micro-batch's examples are merged into trees and packed into rows (`TreeArguments.row_length`), which run one after
    the other; their gradients add up to those of TRL's padded batch. Data preparation, accumulation, evaluation,
    checkpoints, distribution and logging are TRL's and transformers' own.

    Class attributes:
        config_class: preftree's config; TRL's own is taken too.
        predicts_logits: whether `predict` and `compute_metrics` are given the logits of whole sequences.
        reference_columns: where data keep the reference's log-probabilities.
    """

    model: Any
    args: Any
    _total_train_tokens: int
    config_class: type[Any]
    predicts_logits = True
    reference_columns: tuple[str, ...] = ()
    _tp_size = 1  # of tensor parallelism, where TRL's trainer knows of it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((base for base in cls.__mro__ if base.__module__.startswith("trl.")), None)
        if stock is not None:
            setattr(cls, "__signature__", inspect.signature(stock))  # noqa: B010  # for `help` and editors

    def __init__(self, *args, **kwargs):
        signature = inspect.signature(super().__init__)
        if kwargs.get("ref_model") is not None and "ref_model" not in signature.parameters:
            raise ValueError(f"{type(self).__name__} compares with no reference: leave ref_model out")
        given = signature.bind(*args, **kwargs).arguments
        self._check_arguments(given)
        # TRL's constructor already computes reference log-probabilities, so what that needs is set before it runs.
        self._vocabulary = self._vocabulary_of(given)
        self._rotary_limit = rotary_limit(config_of(given["model"], given["args"]))
        self._user_collator = given.get("data_collator") is not None
        self._batch: MicroBatch | None = None
        self._objects_kept = ObjectsKept(False)
        # What training has computed so far on this rank: examples, rows, row_tokens (padding included), tokens, and
        # unshared_tokens (what the same sequences hold one by one).
        self.computed: Counter[str] = Counter()
        self._construct(given)
        if isinstance(given["model"], str):
            check_weights(self.model, "model")
        self._prepare_for_trees()

    # --------------------------------------------------------------------------------------------- of each trainer

    def _objective(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        """The share of these sequences in the micro-batch's loss."""
        raise NotImplementedError

    def _metrics_of(self, batch: MicroBatch) -> Metrics:
        """What TRL logs of a micro-batch."""
        raise NotImplementedError

    @property
    def _additive(self) -> bool:
        """Whether the objective is a sum over rows."""
        return True

    @property
    def _by_example(self) -> bool:
        """Whether the loss is a mean over examples, each by itself."""
        return False

    @property
    def _shares_out(self) -> bool:
        """Whether a step's examples are shared out over ranks by cost: a loss that is a mean over them does not see it."""
        shared = self.args.world_size > 1 and not self._user_collator
        return shared and self._by_example and self._aux_coefficient is None

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self._shares_out:
            share_out(loader, costs_of(loader.dataset, self._trees.layout, self.model.config))
        return loader

    @property
    def _aux_coefficient(self) -> float | None:
        """Weight of a mixture of experts' auxiliary loss, None without."""
        return self.router_aux_loss_coef if getattr(self, "aux_loss_enabled", False) else None

    def _begin(self, model, batch: MicroBatch, inputs: Mapping[str, Any]) -> None:
        """Find what the objective needs of the whole micro-batch before any of its rows runs."""

    def _more_terms(self, batch: MicroBatch, row: PackedRow, out: Any) -> dict[str, torch.Tensor]:
        """What the objective needs beyond the policy's log-probabilities, ``[n]`` each."""
        return {}

    # ------------------------------------------------------------------------------------------------ preparation

    def _check_arguments(self, given: dict[str, Any]) -> None:
        """Complete and check what the constructor was given."""
        model, args = given["model"], given.get("args")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{name.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            args = upgrade(args, self.config_class)
        given["args"] = args
        args.warn_of_unused_options()
        if args.neftune_noise_alpha is not None:
            raise NotImplementedError(
                f"neftune_noise_alpha={args.neftune_noise_alpha}: a shared prefix would get one noise where separate "
                "sequences get several, of a size that depends on the padded length; leave it unset"
            )
        if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
            raise ValueError(
                "activation_offloading=True moves activations from a GPU to its host, and there is no GPU here"
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED and (isinstance(model, str) or args.model_init_kwargs):
            # TRL lets each rank's reference be spread over all GPUs before FSDP shares it out.
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
        for name in ("model", "ref_model"):
            if isinstance(given.get(name), torch.nn.Module):
                check_weights(given[name], name)
        train_dataset = given.get("train_dataset")
        if train_dataset is not None and (sample := next(iter(train_dataset), None)) is not None:
            self.text_fields(sample, "train dataset")
            self._check_ranked_options(given, sample)

    def _check_ranked_options(self, given: dict[str, Any], sample: Mapping[str, Any]) -> None:
        """Options that ranked data exclude, or that need them; ``sample`` is an example."""
        ranked, args = "completions" in sample, given["args"]
        if sample.get(PAIR_WEIGHTS) is not None:
            if not ranked:
                raise ValueError(f"column {PAIR_WEIGHTS!r} weighs the pairs of ranked completions, and there are none")
            if args.pair_weighting != "pair" or self.layout(args).lists:
                other = (
                    f"pair_weighting={args.pair_weighting!r}" if args.pair_weighting != "pair" else "a list objective"
                )
                raise ValueError(f"column {PAIR_WEIGHTS!r} cannot be combined with {other}")
        if ranked and given.get("compute_metrics") is not None and self.predicts_logits:
            raise ValueError(
                "compute_metrics is given the logits of pairs, which ranked data are not: leave it out, or list the pairs"
            )
        for name, default in (("pair_weighting", "pair"), ("ties", "error")):
            if not ranked and getattr(args, name, default) != default:
                warnings.warn(f"{name} has no effect: the data are not ranked completions", UserWarning, stacklevel=2)

    def _vocabulary_of(self, given: dict[str, Any]) -> int:
        return vocabulary_of(given["model"], given["args"])

    def _construct(self, given: dict[str, Any]) -> None:
        super().__init__(**given)

    def _prepare_for_trees(self) -> None:
        """Prepare policy and reference, and put the collator in place; does nothing the second time."""
        for part in (self.model, getattr(self, "ref_model", None)):
            if part is not None and prepared_part(part) is None:
                self._prepare(part)
        if not isinstance(self.data_collator, TreeCollator):
            self._padded = self.data_collator
            self._reader = self._make_reader()
            if self._has_images and self._reader is not None:
                self._padded = self._reader.padded(self.args.max_length)
            self._trees = self._make_collator()
            if self.args.row_length == "auto" and self.args.device.type == "cuda":
                self.add_callback(FitRows(self))
            if not self._user_collator:
                self.data_collator = self._trees

    def _prepare(self, part: torch.nn.Module) -> None:
        """Prepare policy or reference."""
        if self.args.disable_dropout:
            disable_dropout(part)
        elif (found := next(active_dropout(part), None)) is not None:
            raise ValueError(
                f"disable_dropout=False, but {found[0] or 'the model'} has dropout {found[2]}: a shared prefix cannot "
                "reproduce separate dropout masks"
            )
        prepare_model(
            self.accelerator.unwrap_model(part, keep_torch_compile=False),
            self.args.attention_backend,
            compile=self.args.compiles_layers,
            activation_memory_budget=self.args.activation_memory_budget,
            device=self.args.device,
        )
        if (prepared := prepared_part(part)) is not None:
            prepared.contiguous = getattr(self.args, "activation_offloading", False)

    def _make_reader(self) -> ImageReader | None:
        """What reads examples with images, where there may be some."""
        return None

    def _make_collator(self) -> TreeCollator:
        return TreeCollator(
            pad_token_id=self._pad_token_id,
            layout=self.layout(self.args),
            row_length=self.args.given_row_length,
            static=self.args.device.type == "cuda",
            lengths=FEW_LENGTHS if may_use_flex(self.args.attention_backend, self.args.device) else MANY_LENGTHS,
            share_prefixes=self.args.share_prefixes,
            rotary_limit=self._rotary_limit,
            columns=self.columns,
            reference_columns=self.reference_columns,
            reader=self._reader,
            padded=self._padded if self.compute_metrics is not None and self.predicts_logits else None,
        )

    def use_rows_of(self, length: int) -> None:
        """Pack micro-batches into rows of so many tokens from now on, or of the longest tree in them."""
        self._trees.row_length, self._trees.grows = length, True

    @cached_property
    def exchange(self) -> HostExchange:
        """What ranks tell each other of what their hosts know."""
        return HostExchange(self.accelerator, self.args.ddp_timeout)

    @property
    def _pad_token_id(self) -> int:
        tokenizer: Any = getattr(self, "_tokenizer", self.processing_class)
        return tokenizer.pad_token_id

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._signature_columns is not None:
            self._signature_columns += [*RANKED_COLUMNS, RANKED_REFERENCE]
            if self._has_images:
                self._signature_columns += ["prompt", *self.fields, *IMAGE_COLUMNS, *TEMPLATE_COLUMNS, ROW]

    # ------------------------------------------------------------------------------------------------------ steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        batch = self._batch = self._micro_batch(inputs)
        self._begin(model, batch, inputs)
        if len(batch.rows) > 1 and not (self._additive and self._aux_coefficient is None):
            # The loss is no sum over rows: a first pass without gradients finds its gradient by what they add up to.
            with torch.no_grad():
                whole = self._run(model, batch)
            batch.gradient = Gradient.of(partial(self._loss, batch), whole)
        loss = torch.zeros((), device=self.args.device)
        begun = now(self.args.device)
        for number in range(len(batch.rows)):
            # Gradients are exchanged between ranks once, with the last row.
            last = number == len(batch.rows) - 1
            together = contextlib.nullcontext() if last else to_be_continued(self.accelerator, model)
            since = begun if number else None
            with (
                together,
                unchanged_since(since, model, getattr(self, "ref_model", None)),
                adding_to_gradients(adds_in_place(self.accelerator, model, last)),
                gradients_apart(model, self._tp_size),
            ):
                loss = loss + super().training_step(model, {"row": number}, num_items_in_batch)
            batch.rows[number].derived.clear()
        if batch.gradient is not None:
            loss = batch.gradient.loss / self.current_gradient_accumulation_steps
        self._log_metrics(batch, "train")
        self.computed["examples"] += batch.examples
        self._count(batch)
        self._batch = None
        self._objects_kept.after_step()
        return self._finite_losses.replace(loss, self.state.global_step)

    def _inner_training_loop(self, *args, **kwargs):
        self._objects_kept = ObjectsKept(self.args.device.type != "cpu")
        with self._objects_kept:
            return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "row" in inputs and self._batch is not None:
            return self._row_loss(model, self._batch, inputs["row"])
        batch, loss = self._whole_loss(model, inputs)
        self._log_metrics(batch, "train" if self.model.training else "eval")
        return (loss, self._outputs(model, inputs, batch)) if return_outputs else loss

    def _whole_loss(self, model, inputs: dict[str, Any]) -> tuple[MicroBatch, torch.Tensor]:
        """A collated batch, run, and its loss."""
        batch = self._micro_batch(inputs)
        self._begin(model, batch, inputs)
        return batch, self._loss(batch, self._run(model, batch))

    def _outputs(self, model, inputs, batch: MicroBatch) -> Any:
        """What `compute_metrics` and `predict` are given: the padded batch's logits."""
        warnings.warn(
            "`compute_metrics` and `predict` are given the logits of whole sequences, which are computed for them with an "
            "extra, unshared forward pass.",
            FutureWarning,
            stacklevel=3,
        )
        padded = inputs["padded"]
        inputs["input_ids"] = padded["input_ids"]  # `prediction_step` hands these to compute_metrics as labels
        with torch.no_grad():
            names = {"input_ids", "attention_mask"}
            if self._has_images:
                names = padded.keys() - {"completion_mask"}
            return model(**{name: padded[name] for name in names}, use_cache=False)

    def predict(self, *args, **kwargs):
        # Predictions are logits of whole sequences: batches must hold these too.
        given = self._trees.padded
        self._trees.padded = self._padded if self.predicts_logits else None
        try:
            return super().predict(*args, **kwargs)
        finally:
            self._trees.padded = given

    def _micro_batch(self, inputs: dict[str, Any]) -> MicroBatch:
        if "rows" not in inputs:  # a collator of the user's, in TRL's padded format
            if images := [name for name in inputs if name.startswith(("pixel_values", "image_"))]:
                raise NotImplementedError(
                    f"data_collator gives {images[0]!r} of a whole batch, which cannot be told apart by example: leave it out"
                )
            inputs.update(self._trees.from_padded(inputs))
        sent = TreeBatch(inputs).to(self.args.device)
        return self._aligned(MicroBatch.from_inputs(self._prepare_inputs(sent), self.columns))

    def _aligned(self, batch: MicroBatch) -> MicroBatch:
        """With as many rows as on every other rank: collectives inside the model would wait for ever otherwise."""
        if self.args.world_size == 1:
            return batch
        seen = batch.rows_with_images
        counts = self.exchange.gather([len(batch.rows) - seen, seen, batch.normaliser, batch.num_tokens])
        batch.tokens_of_ranks = int(counts[:, 3].sum())
        (_, fewest), (without_images, with_images) = torch.stack(counts[:, :2].aminmax(dim=0)).long().tolist()
        if self._shares_out:
            # Ranks' losses are averaged: each counts as much as it has of all examples.
            batch.weights = batch.weights * (batch.normaliser * self.args.world_size / float(counts[:, 2].sum()))
        if with_images and not fewest and self.accelerator.distributed_type in _SHARDING:
            raise NotImplementedError(
                f"a rank's batch has images and another's has none: with {self.accelerator.distributed_type.value} both must "
                "look at some, for they share out the weights of what looks at images; use DDP, larger batches, or data in "
                "which all prompts have images"
            )
        plain = empty_row(len(batch.rows[0]), self._pad_token_id).to(self.args.device)
        batch.align(plain, without_images, with_images)
        if self.accelerator.distributed_type in _SHARDING:
            predicted = self.exchange.gather([row.predicted_nodes.numel() for row in batch.rows]).amax(0)
            for row, most in zip(batch.rows, predicted.long().tolist(), strict=True):
                row.most_predicted = most
        return batch

    def _row_loss(self, model, batch: MicroBatch, number: int) -> torch.Tensor:
        """The row's share of the micro-batch's loss."""
        terms = self._terms(model, batch, number, again=batch.gradient is not None)
        if batch.gradient is None:
            return self._loss(batch, terms)
        return batch.gradient.linear(batch.rows[number], terms)

    def _run(self, model, batch: MicroBatch) -> Terms:
        """The terms of all rows, as those of the whole micro-batch."""
        return Terms.join(batch, [self._terms(model, batch, number) for number in range(len(batch.rows))])

    def _terms(self, model, batch: MicroBatch, number: int, again: bool = False) -> Terms:
        """What the model gives for one row; what metrics need goes into the micro-batch's record.

        Args:
            again: the row has run before, so only what has a gradient is wanted.
        """
        row = batch.rows[number]
        out = sequence_logps(model, row, statistics=not again, experts=self._aux_coefficient is not None)
        values = self._policy_terms(row, out)
        if not again:
            values |= self._more_terms(batch, row, out)
            batch.record(row, **values, **statistics(out))
        totals = {"expert_counts": out.expert_counts, "expert_probs": out.expert_probs}
        return Terms(batch.members[number], values, {name: v for name, v in totals.items() if v is not None})

    def _policy_terms(self, row: PackedRow, out: Any) -> dict[str, torch.Tensor]:
        """The policy's share of the terms, ``[n]`` each."""
        return {"logps": out.logps, "lengths": row.completion_lengths, "scored": row.scored_lengths}

    def _loss(self, batch: MicroBatch, terms: Terms) -> torch.Tensor:
        """The share of these sequences in the micro-batch's loss, the auxiliary loss of experts included."""
        loss = self._objective(batch, terms)
        if self._aux_coefficient is not None:
            aux_loss = load_balancing(terms.totals["expert_counts"], terms.totals["expert_probs"])
            batch.scalars["aux_loss"] = aux_loss.detach()
            loss = loss + self._aux_coefficient * aux_loss
        return loss

    def _of_units(self, values: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Of values of all units in the micro-batch, those of the terms' units."""
        return values.to(self.args.device)[terms.members["unit"].to(self.args.device)]

    def _weighted_sum(self, batch: MicroBatch, terms: Terms, losses: torch.Tensor) -> torch.Tensor:
        """What the losses ``[units]`` of these units add to the micro-batch's."""
        return (self._of_units(batch.weights, terms) * losses).sum()

    # ---------------------------------------------------------------------------------------------------- metrics

    def _count(self, batch: MicroBatch) -> None:
        """Count what training computes, and would compute unshared, on this rank."""
        self.computed["rows"] += len(batch.rows)
        self.computed["row_tokens"] += sum(len(row) for row in batch.rows)
        self.computed["tokens"] += sum(row.num_tokens for row in batch.rows)
        self.computed["unshared_tokens"] += batch.num_tokens

    def _log_metrics(self, batch: MicroBatch, mode: str) -> None:
        values = self._metrics_of(batch)
        if "aux_loss" in batch.scalars:
            values["aux_loss"] = mean_of_ranks(batch.scalars["aux_loss"])
        self._keep_metrics(values, mode)
        if mode == "train":
            self._total_train_tokens += batch.tokens_of_ranks // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """`include_num_input_tokens_seen`: the tokens of TRL's padded batch, or ("non_padding") of its sequences."""
        if "rows" not in inputs or self.args.include_num_input_tokens_seen == "no":
            return super()._track_num_input_tokens(inputs)
        count = inputs["num_tokens"]
        if self.args.include_num_input_tokens_seen != "non_padding":
            longest = max(int(row.sequence_lengths.max()) for row in inputs["rows"])
            multiple = getattr(self._padded, "pad_to_multiple_of", None) or 1
            count = len(inputs["weights"]) * len(self._trees.layout.sides) * -(-longest // multiple) * multiple
        self.state.num_input_tokens_seen += int(self.exchange.gather([count]).sum())
        return None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and computed token; attention's own are left out, as transformers does."""
        if "rows" not in inputs:
            return super().floating_point_ops(inputs)
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return 6 * sum(row.num_tokens for row in inputs["rows"]) * model.num_parameters(exclude_embeddings=True)
