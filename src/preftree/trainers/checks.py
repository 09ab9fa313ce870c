"""What is wrong with preference data, said with the row and the field, before any training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import trl
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from preftree.trainers.columns import IMAGE_COLUMNS, PAIR_FIELDS, ROW
from preftree.trainers.groups import PAIR_WEIGHTS
from preftree.trainers.templates import check_parts, render

_MESSAGE_FORM = "a list of messages {'role': ..., 'content': ...}"
# What rows may not set of how it is called: trainers do, and a template comes with the tokenizer.
_OF_CALLS = set(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"tools", "documents", "kwargs"}


def check_columns(
    columns: Iterable[str] | None,
    source: str,
    fields: Sequence[str] = PAIR_FIELDS,
    ranked: bool = True,
    images: bool = False,
) -> tuple[str, ...]:
    """The fields that are there beside `prompt` (which may be implicit in them): none in ranked data, which hold `prompt`,
    `completions` and `scores` or `ranks`.

    Raises:
        ValueError: if one is missing, or the data are ranked and may not be.
        NotImplementedError: for images, unless they may be there and the data are pairs.
    """
    columns = list(columns or ())
    needed = tuple(fields)
    if "completions" in columns:
        if not ranked:
            raise ValueError(
                f"{source}: column 'completions': this trainer takes no ranked data, but {', '.join(fields)}"
            )
        needed, fields = ("prompt",), ()
        if ("scores" in columns) == ("ranks" in columns):
            found = "both" if "scores" in columns else "neither"
            raise ValueError(f"{source}: ranked completions need a column 'scores' or 'ranks', but there are {found}")
    for name in needed:
        if columns and name not in columns:
            raise ValueError(f"{source}: there is no column {name!r} (columns: {', '.join(columns)})")
    image_columns = [name for name in IMAGE_COLUMNS if name in columns]
    if image_columns and not images:
        raise NotImplementedError(f"{source}: column {image_columns[0]!r}: this trainer takes no images")
    if image_columns and "completions" in columns:
        raise NotImplementedError(
            f"{source}: columns 'completions' and {image_columns[0]!r}: ranked completions may have no images: list the pairs"
        )
    if len(image_columns) > 1:
        raise ValueError(f"{source}: columns 'image' and 'images': there may be one of them")
    if image_columns and "prompt" not in columns:
        raise ValueError(f"{source}: there is no column 'prompt', which data with images need")
    return tuple(fields)


def check_example(
    example: Mapping[str, Any],
    where: str,
    chat_template: bool,
    fields: Sequence[str] = PAIR_FIELDS,
    ties: str = "error",
) -> None:
    """Types and contents of one example as it stands in the data.

    Raises:
        ValueError: naming ``where`` and the field.
    """
    if "prompt" in example:
        fields = ("prompt", *fields)
    values = {name: example.get(name) for name in fields}
    if "completions" in example:
        pair_weights_of(example, where, scores_of(example, where, ties))
        values = {"prompt": example.get("prompt")}
        values |= {f"completions[{index}]": value for index, value in enumerate(example["completions"])}
    kinds = {name: _kind(value, where, name) for name, value in values.items()}
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{where}: all fields must be of one kind, but {described}")
    if "messages" in kinds.values() and not chat_template:
        raise ValueError(
            f"{where}: the data are chats, but the tokenizer has no chat template: set tokenizer.chat_template (for "
            "the command line: --chat_template_path), or give plain text"
        )
    _check_template_columns(example, where)


def _check_extracted_prompt(example: Mapping[str, Any], where: str, fields: Sequence[str]) -> None:
    """What TRL would take for the prompt of an example that names none is there, and all fields start with it."""
    prompt = trl.extract_prompt(dict(example))["prompt"]
    others = [name for name in fields if example[name][: len(prompt)] != prompt]
    # (TRL takes all but the last character for the prompt of a text that ends with a space and differs from its first on.)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()) or set(others) & set(PAIR_FIELDS):
        raise ValueError(
            f"{where}, field 'prompt': empty: there is no such column, and before their last message or character 'chosen' "
            "and 'rejected' do not start alike"
        )
    if others:
        raise ValueError(
            f"{where}, field {others[0]!r}: it does not start with the prompt that 'chosen' and 'rejected' share "
            f"({str(prompt)[:40]!r}): give a column 'prompt'"
        )


def _check_template_columns(example: Mapping[str, Any], where: str) -> None:
    """What a chat template is given beside messages: lists of objects (or these as JSON), and named settings."""
    tools = example.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"{where}, field 'tools': not valid JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError(
            f"{where}, field 'tools': must be a list of objects, not {type(tools).__name__} {str(tools)[:40]!r}"
        )
    if "chat_template_kwargs" in example and not isinstance(example["chat_template_kwargs"], Mapping):
        kind = type(example["chat_template_kwargs"]).__name__
        raise ValueError(f"{where}, field 'chat_template_kwargs': must be an object in every row, not {kind}")
    if refused := sorted(_OF_CALLS.intersection(example.get("chat_template_kwargs", ()))):
        raise ValueError(
            f"{where}, field 'chat_template_kwargs': {refused[0]!r} is no variable of a template: leave it out (the template "
            "itself belongs to the tokenizer)"
        )


def scores_of(example: Mapping[str, Any], where: str, ties: str = "error") -> list[float]:
    """The scores of a ranked example's completions, higher is better (`ranks`: 1 is best).

    Args:
        ties: "error", or "drop": completions of equal score are allowed as long as some differ.

    Raises:
        ValueError: naming ``where`` and the field.
    """
    completions = example.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        count = len(completions) if isinstance(completions, list) else "no"
        raise ValueError(f"{where}, field 'completions': {count} completion(s), but a comparison needs at least two")
    name = "ranks" if example.get("ranks") is not None else "scores"
    values = example.get(name)
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        found = len(values) if isinstance(values, (list, tuple)) else "no"
        raise ValueError(f"{where}, field {name!r}: {found} values for {len(completions)} completions")
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where}, field {name!r}, value {index}: {value!r} is not a finite number")
    if len(set(values)) == 1:
        raise ValueError(f"{where}, field {name!r}: all are {values[0]}, so nothing is better than anything")
    if len(set(values)) < len(values) and ties == "error":
        raise ValueError(
            f"{where}, field {name!r}: equal values ({', '.join(map(str, values))}) have no order: ties='drop' makes no "
            "pair of these"
        )
    return [float(-value if name == "ranks" else value) for value in values]


def pair_weights_of(example: Mapping[str, Any], where: str, scores: Sequence[float]) -> list[list[float]] | None:
    """The user's own pairs of a ranked example, ``[better, worse, weight]`` by index, or None.

    Raises:
        ValueError: naming ``where`` and the field.
    """
    given = example.get(PAIR_WEIGHTS)
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{where}, field {PAIR_WEIGHTS!r}: must be a list of [better, worse, weight], and not empty")
    for number, triple in enumerate(given):
        which = f"{where}, field {PAIR_WEIGHTS!r}, pair {number}"
        if not isinstance(triple, (list, tuple)) or len(triple) != 3:
            raise ValueError(f"{which}: {triple!r} is not [better, worse, weight]")
        better, worse, weight = triple
        if any(index not in range(len(scores)) for index in (better, worse)):
            raise ValueError(f"{which}: {better!r} and {worse!r} must be indices of {len(scores)} completions")
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{which}: weight {weight!r} is not a number of at least 0")
        if scores[int(better)] <= scores[int(worse)]:
            raise ValueError(f"{which}: completion {int(better)} is not scored above {int(worse)}")
    return [[float(value) for value in triple] for triple in given]


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


def check_raw(
    dataset: Dataset | IterableDataset,
    source: str,
    processing_class: Any,
    fields: Sequence[str] = PAIR_FIELDS,
    ties: str = "error",
    extracts_prompt: bool = True,
) -> Dataset | IterableDataset:
    """The data set as it stands in the data, checked; its rows numbered in a column. A stream is checked as it comes.

    Args:
        processing_class: whose chat template is to take chats; of a stream it is tried for each row.
        extracts_prompt: whether the prompt of data without such a column is what fields have in common.

    Raises:
        ValueError: naming row and field.
    """

    chat_template = getattr(processing_class, "chat_template", None) is not None
    stream = isinstance(dataset, IterableDataset)

    def checked(example: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{source}, row {index}"
        check_example(example, where, chat_template, fields, ties)
        if extracts_prompt and "prompt" not in example:
            _check_extracted_prompt(example, where, fields)
        completions = {f"completions[{index}]": value for index, value in enumerate(example.get("completions") or ())}
        given, names = {**example, **completions}, (*fields, *completions)
        check_parts(given, where, names, processing_class)
        if stream:
            render(given, where, names, processing_class)
        return example

    if stream:
        return dataset.map(checked, with_indices=True)
    for index, example in enumerate(dataset):
        checked(example, index)
    return dataset.add_column(ROW, list(range(len(dataset))))


def check_numbers(dataset: Dataset | IterableDataset, names: Iterable[str], source: str) -> None:
    """Raise `ValueError` for the first row in which one of these columns, where there is one, holds no finite number.

    A stream is not looked at.
    """
    if isinstance(dataset, IterableDataset):
        return
    for name in names:
        for index, value in enumerate(dataset[name] if name in dataset.column_names else ()):
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{source}, row {index}, field {name!r}: {value!r} is not a finite number")
