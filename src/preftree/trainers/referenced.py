"""`ReferencedTrainer`: objectives that compare with a reference model, computed in the same packed rows or cached on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed
from trl.trainer.utils import get_config_model_id, hash_module, use_adapter

from preftree.logprobs import sequence_logps
from preftree.models import prepared_part
from preftree.models.offload import offload_layers
from preftree.models.prepared import below_peft
from preftree.packing import PackedRow
from preftree.trainers import reference
from preftree.trainers.base import TreeTrainer
from preftree.trainers.columns import ROW
from preftree.trainers.groups import RANKED_REFERENCE
from preftree.trainers.sharded_reference import sharded_by_layers
from preftree.trainers.step import MicroBatch, weighted_logps
from preftree.version import __version__


class ReferencedTrainer(TreeTrainer):
    """Adds the reference's log-probabilities to the terms of a loss."""

    ld_alpha: float | None = None
    _reference: Any = None
    # DeepSpeed's, around a policy that is asked for reference values before it is trained.
    _precompute_engine: Any = None

    @property
    def ref_model(self) -> Any:
        """The reference, if it is a model of its own."""
        return self._reference

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        self._reference = model
        # FSDP shards it in TRL's constructor already: from then on only calls of the model as a whole find its weights.
        if isinstance(model, PreTrainedModel) and self.is_fsdp_enabled and prepared_part(model) is None:
            self._prepare(model)

    def _check_arguments(self, given: dict[str, Any]) -> None:
        super()._check_arguments(given)
        model, args = given["model"], given["args"]
        adapted = given.get("peft_config") is not None or below_peft(model) is not None
        if args.offload_reference and adapted and given.get("ref_model") is None:
            raise ValueError(
                "offload_reference=True: the reference is the policy itself with its adapter off, there is no second model. "
                "Leave offload_reference out"
            )
        own = (
            given.get("ref_model") is not None or given.get("peft_config") is not None or args.precompute_ref_log_probs
        )
        if not own and isinstance(model, PreTrainedModel) and not get_config_model_id(model.config):
            raise ValueError(
                f"{type(self).__name__} compares with a reference, and there is none: the model was not loaded from a name "
                "or folder from which to load it again. Pass ref_model, or set precompute_ref_log_probs=True"
            )

    def _construct(self, given: dict[str, Any]) -> None:
        with sharded_by_layers(type(self), given["args"].sync_ref_model):
            super()._construct(given)

    def _prepare_for_trees(self) -> None:
        model: Any = getattr(self, "ref_model", None)
        new = model is not None and prepared_part(model) is None
        super()._prepare_for_trees()
        offloads = self.args.offload_reference and not self.precompute_ref_logps
        if new and offloads and (prepared := prepared_part(model)) is not None:
            offload_layers(prepared, self.args.device)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[torch.nn.Module]:
        """The reference: a second model, or the policy with its adapter off (or the adapter it started from on)."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.accelerator.autocast())
            model = self.ref_model
            if model is None:
                model = self._precompute_engine or self.model
                stack.enter_context(disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs))
                peft_model = self.accelerator.unwrap_model(self.model)
                if hasattr(peft_model, "disable_adapter"):
                    adapter = "ref" if "ref" in peft_model.peft_config else None
                    stack.enter_context(use_adapter(peft_model, adapter_name=adapter))
            yield model

    def _reference_logps(self, row: PackedRow, batch: MicroBatch) -> torch.Tensor:
        """The reference's log-probabilities of the row's sequences ``[n]``, cached ones where the data have them."""
        if not self.precompute_ref_logps:
            return self._run_row_of_reference(row)
        if batch.reference is None:
            raise ValueError(
                f"precompute_ref_log_probs=True, but the batch has no {' and '.join(self.reference_columns)}: a data "
                "collator must hand these columns on"
            )
        return batch.reference.to(self.args.device)[row.sequence_ids]

    def _run_row_of_reference(self, row: PackedRow) -> torch.Tensor:
        with self._as_reference() as model:
            return weighted_logps(sequence_logps(model, row), self.ld_alpha)

    def _reference_of(self, batch: MicroBatch) -> list[torch.Tensor]:
        """The reference's log-probabilities of each example's sequences."""
        for row in batch.rows:
            values = self._run_row_of_reference(row)
            if row.num_sequences:
                batch.record(row, ref=values)
        return list(batch.values["ref"].split(batch.group_sizes))

    def _reference_columns(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The columns to cache for a collated batch: ``[examples]`` each, or ``[examples, most responses]``, NaN behind."""
        by_example = self._reference_of(self._micro_batch(dict(inputs)))
        if inputs["ranked"]:
            table = torch.nn.utils.rnn.pad_sequence(by_example, batch_first=True, padding_value=float("nan"))
            return {RANKED_REFERENCE: table}
        table = torch.stack(by_example)
        return dict(zip(self.reference_columns, table.unbind(1), strict=True))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if isinstance(dataset, IterableDataset):
            return getattr(super(), "_precompute_ref_logps")(dataset, name, batch_size)  # noqa: B009  # raises
        self._prepare_for_trees()
        args = self.args
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        settings = {
            "config": reference.arithmetic_of(model.config),
            "max_length": args.max_length,
            "truncation_mode": self._trees.layout.truncation_mode,
            "ld_alpha": self.ld_alpha,
            "precision": self.accelerator.mixed_precision,
            "dtype": str(next(model.parameters()).dtype),
            "device": args.device.type,
            "versions": [__version__, torch.__version__],
        }
        examples = dataset.select_columns(self._columns_of_reference(dataset))
        contents = map(self._trees.content, examples)
        if is_deepspeed_zero3_enabled():  # TRL has seen nothing of weights that are shared out
            model_hash = reference.hash_gathered(model)
        else:
            model_hash = self._precompute_model_hash or hash_module(model)
        keys = [reference.content_key(model_hash, contents, settings)]
        broadcast_object_list(keys)  # ranks with a share of the weights have hashed it alone
        path = Path(args.ref_logps_cache_dir or reference.default_directory()) / f"{keys[0]}.safetensors"
        columns = reference.load(path, keys[0], len(dataset))
        # Computed by all ranks together, if one of them has none.
        known = self.exchange.gather([columns is not None]).all()
        if columns is None or not known:
            columns = self._run_reference(examples, name, batch_size)
            if self.accelerator.is_local_main_process:
                reference.save(path, keys[0], columns)
            self.accelerator.wait_for_everyone()
        for column, values in columns.items():
            dataset = dataset.add_column(column, reference.rows_of(values))
        return dataset

    def _columns_of_reference(self, dataset: Dataset) -> list[str]:
        """The columns that the reference's log-probabilities are computed from."""
        if ROW in dataset.column_names:  # not tokenised yet
            return [name for name in dataset.column_names if name not in self.reference_columns]
        return self._trees.layout.token_columns(dataset.column_names)

    def _run_reference(self, examples: Dataset, name: str, batch_size: int) -> dict[str, torch.Tensor]:
        loader = torch.utils.data.DataLoader(
            examples,
            batch_size=batch_size,
            collate_fn=self._trees,
            num_workers=self.args.dataloader_num_workers,
            shuffle=False,
        )
        loader = self.accelerator.prepare(loader)
        if self.ref_model is None and self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        parts: list[dict[str, torch.Tensor]] = []
        was_training = self.model.training
        self.model.eval()
        for inputs in tqdm(loader, desc=f"Computing reference log probs for {name} dataset"):
            columns = self._reference_columns(inputs)
            padded = self.accelerator.pad_across_processes(columns, dim=1, pad_index=float("nan"))
            parts.append(self.accelerator.gather_for_metrics(padded))
        self.model.train(was_training)
        return reference.join(parts)
