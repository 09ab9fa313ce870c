"""What is wrong with preference data, said with the row and the field, before any training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from transformers import AutoConfig

from preftree.trainers.collator import pair_tree

logger = logging.getLogger(__name__)

_ROW = "preftree_row"
_MESSAGE_FORM = "a list of messages {'role': ..., 'content': ...}"


def check_columns(columns: Iterable[str] | None, source: str) -> None:
    """`chosen` and `rejected` must be there; `prompt` may be implicit in them."""
    columns = list(columns or ())
    for name in ("chosen", "rejected"):
        if columns and name not in columns:
            raise ValueError(f"{source}: there is no column {name!r} (columns: {', '.join(columns)})")
    for name in ("image", "images"):
        if name in columns:
            raise NotImplementedError(f"{source}: column {name!r}: images are not supported yet")


def check_example(example: Mapping[str, Any], where: str, chat_template: bool) -> None:
    """Types and contents of one pair as it stands in the data.

    Raises:
        ValueError: naming ``where`` and the field.
    """
    fields = ("prompt", "chosen", "rejected") if "prompt" in example else ("chosen", "rejected")
    kinds = {name: _kind(example.get(name), where, name) for name in fields}
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{where}: all fields must be of one kind, but {described}")
    if "messages" in kinds.values() and not chat_template:
        raise ValueError(
            f"{where}: the data are chats, but the tokenizer has no chat template: set tokenizer.chat_template (for "
            "the command line: --chat_template_path), or give plain text"
        )


def _kind(value: Any, where: str, name: str) -> str:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where}, field {name!r}: empty")
        return "text"
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        if not value:
            raise ValueError(f"{where}, field {name!r}: empty (no message)")
        for number, message in enumerate(value):
            if not isinstance(message.get("role"), str):
                raise ValueError(f"{where}, field {name!r}, message {number}: no 'role'")
            content = message.get("content")
            if content is None and message.get("tool_calls"):
                continue
            if not isinstance(content, (str, list)):
                raise ValueError(
                    f"{where}, field {name!r}, message {number}: 'content' is {type(content).__name__}, not a string"
                )
            if not content and not message.get("tool_calls"):
                raise ValueError(f"{where}, field {name!r}, message {number}: 'content' is empty")
        return "messages"
    found = "missing" if value is None else f"of type {type(value).__name__}"
    raise ValueError(f"{where}, field {name!r} is {found}; it must be a string or {_MESSAGE_FORM}")


class PairCheck:
    """Checks tokenised pairs and says which to keep; counts what it warns about.

    Args:
        source: name of the data, for messages.
        vocabulary: token ids must be below it.
        max_length, truncation_mode: as in TRL.
        row_length: a pair must fit into it; None for no limit.
        share_prefixes: whether the pair is one tree, or its sequences lie side by side.
        overlong: what to do with a pair longer than max_length or row_length: None cuts at max_length as TRL does and
            raises at row_length; "truncate" cuts at both, "drop" leaves out, "error" raises. A pair whose prompt alone
            fills max_length has nothing left to learn from: None and "truncate" leave it out, as TRL does.
    """

    def __init__(
        self,
        source: str,
        vocabulary: int,
        max_length: int | None,
        truncation_mode: str,
        row_length: int | None,
        overlong: str | None,
        share_prefixes: bool = True,
    ):
        self.source = source
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.row_length = row_length
        self.overlong = overlong
        self.share_prefixes = share_prefixes
        # Counted, and told by `report`.
        self.identical = 0
        self.dropped = 0
        self.without_completion = 0
        self.shortened = 0

    def __call__(self, example: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """The pair, possibly with shorter responses, or None to drop it.

        Raises:
            ValueError: naming ``where`` and the field.
        """
        if example.get("prompt") in ("", []):
            raise ValueError(
                f"{where}, field 'prompt': empty (if the data have no prompt column: 'chosen' and 'rejected' do not "
                "start alike)"
            )
        for name in ("chosen_ids", "rejected_ids"):
            if not len(example[name]):
                raise ValueError(f"{where}, field {name.removesuffix('_ids')!r}: no token is left of it")
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            highest = max(example[name], default=0)
            if highest >= self.vocabulary:
                raise ValueError(
                    f"{where}, field {name.removesuffix('_ids')!r}: token id {highest} is outside the model's "
                    f"vocabulary of {self.vocabulary}: does the tokenizer belong to the model?"
                )
        if list(example["chosen_ids"]) == list(example["rejected_ids"]):
            self.identical += 1
        longest = len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))
        if self.max_length is not None and longest > self.max_length and self.overlong in ("drop", "error"):
            self._refuse(where, f"{longest} tokens are more than max_length={self.max_length}")
            return None
        if (
            self.max_length is not None
            and self.truncation_mode == "keep_start"
            and len(example["prompt_ids"]) >= self.max_length
        ):
            self.without_completion += 1
            return None
        if self.row_length is None:
            return dict(example)
        tokens = self._row_tokens(example, self.max_length, self.truncation_mode)
        if tokens <= self.row_length:
            return dict(example)
        if self.overlong != "truncate":
            self._refuse(where, f"the pair's {tokens} tokens do not fit into row_length={self.row_length}")
            return None
        return self._shorten(example, where)

    def _row_tokens(self, example: Mapping[str, Any], max_length: int | None, mode: str) -> int:
        tree = pair_tree(example, max_length, mode)
        return len(tree) if self.share_prefixes else tree.num_unshared_tokens

    def _refuse(self, where: str, why: str) -> None:
        if self.overlong == "drop":
            self.dropped += 1
            return
        raise ValueError(
            f"{where}: {why}: raise it, or choose what to do with such pairs: overlong='drop' or overlong='truncate'"
        )

    def _shorten(self, example: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """Both sequences cut to the largest common length whose tree fits."""
        prompt, row_length = example["prompt_ids"], self.row_length
        longest = len(prompt) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))
        low, high = len(prompt), min(longest, self.max_length or longest)
        while low < high:  # the largest cut that fits; `low` always fits or no cut does
            middle = (low + high + 1) // 2
            if row_length is not None and self._row_tokens(example, middle, "keep_start") <= row_length:
                low = middle
            else:
                high = middle - 1
        if low <= len(prompt):
            raise ValueError(
                f"{where}, field 'prompt': its {len(prompt)} tokens leave no room in a row of {row_length}"
            )
        self.shortened += 1
        room = low - len(prompt)
        cut = {name: list(example[name])[:room] for name in ("chosen_ids", "rejected_ids")}
        return {**example, **cut}

    def report(self) -> None:
        """Warn once about what was counted."""
        if self.identical:
            logger.warning(
                "%s: in %d pairs chosen and rejected are equal: they teach nothing", self.source, self.identical
            )
        if self.dropped:
            logger.warning("%s: %d pairs were too long and are left out (overlong='drop')", self.source, self.dropped)
        if self.without_completion:
            logger.warning(
                "%s: in %d pairs the prompt alone fills max_length=%s: they are left out",
                self.source,
                self.without_completion,
                self.max_length,
            )
        if self.shortened:
            logger.warning(
                "%s: %d pairs were cut to fit into row_length=%s (overlong='truncate')",
                self.source,
                self.shortened,
                self.row_length,
            )


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenise: Callable[[Any], Any],
    check: PairCheck,
    chat_template: bool,
) -> Dataset | IterableDataset:
    """A data set checked, tokenised and checked again.

    Args:
        tokenise: adds `prompt_ids`, `chosen_ids` and `rejected_ids`.
        check: what is checked in tokenised pairs.
        chat_template: whether the tokenizer can take chats.

    Raises:
        ValueError: naming row and field. A stream is checked as it comes; its rows are numbered in that order.
    """
    source = check.source
    check_columns(dataset.column_names, source)

    def checked(example: dict[str, Any], index: int) -> dict[str, Any]:
        check_example(example, f"{source}, row {index}", chat_template)
        return example

    if isinstance(dataset, IterableDataset):

        def kept_or_empty(example: dict[str, Any], index: int) -> dict[str, Any]:
            return check(example, f"{source}, row {index}") or {**example, "chosen_ids": []}

        dataset = tokenise(dataset.map(checked, with_indices=True))
        return dataset.map(kept_or_empty, with_indices=True).filter(lambda example: example["chosen_ids"])
    for index, example in enumerate(dataset):
        checked(example, index)
    # Rows keep the number they have in the user's data.
    dataset = tokenise(dataset.add_column(_ROW, list(range(len(dataset)))))
    kept, changed = [], {}
    columns = [n for n in (_ROW, "prompt", "prompt_ids", "chosen_ids", "rejected_ids") if n in dataset.column_names]
    for index, example in enumerate(dataset.select_columns(columns)):
        pair = check(example, f"{source}, row {example[_ROW]}")
        if pair is not None:
            kept.append(index)
            if pair != example:
                changed[index] = pair
    check.report()
    if not kept:
        raise ValueError(f"{source}: no pair is left to train on: all are too long (max_length={check.max_length})")
    if changed:
        dataset = dataset.map(lambda example, index: changed.get(index, example), with_indices=True)
    dataset = dataset.remove_columns(_ROW)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def check_weights(model: torch.nn.Module, name: str) -> None:
    """Raise `ValueError` naming the first parameter that holds a value which is not finite."""
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"{name}: parameter {parameter_name!r} holds NaN or infinity: the weights are damaged")


def vocabulary_of(model: Any, args: trl.DPOConfig) -> int:
    """Token ids that the model has an embedding for (of a model still to be loaded: by its config)."""
    if not isinstance(model, str):
        return model.get_input_embeddings().num_embeddings
    loading: Any = args.model_init_kwargs or {}
    named = {name: loading[name] for name in ("revision", "gguf_file", "subfolder", "token") if name in loading}
    config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **named)
    return config.get_text_config().vocab_size
