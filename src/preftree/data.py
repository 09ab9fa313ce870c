"""Preference files: JSON Lines, JSON, CSV and Parquet, with errors that name file, row and field."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets

from preftree.readers import SUFFIXES, rows_of, suffix_of
from preftree.trainers.checks import check_columns, check_example
from preftree.trainers.columns import COLUMNS, IMAGE_COLUMNS, TEXT_FIELDS

# A split's file among several.
_PART = re.compile(r"(?P<split>.+?)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.")
# More are kept on the disk.
_ROWS_IN_MEMORY = 10_000
# In each other: what `datasets` does to a column doubles with each.
_MOST_LISTS = 12
# What a column raises for values that it cannot hold.
_NO_COLUMN = (pyarrow.ArrowException, TypeError, OverflowError)
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_local(name: str) -> bool:
    """Whether a dataset's name means files here rather than a name on the Hub."""
    return Path(name).exists() or suffix_of(Path(name)) in SUFFIXES


TextFields = Callable[[Iterable[str], str], tuple[str, ...]]


def find_files(name: str) -> dict[str, list[Path]]:
    """Splits of a local data set: a file is its "train"; in a folder each file is the split it is named after.

    Files of one split are named as the Hub names them: ``train-00000-of-00003.parquet`` and so on.

    Raises:
        FileNotFoundError: if there is no such file or folder, no file of a known kind in it, or not all of a split's.
    """
    path = Path(name)
    if path.is_dir():
        files: dict[str, list[Path]] = {}
        for file in sorted(path.iterdir()):
            if suffix_of(file) in SUFFIXES:
                part = _PART.match(file.name)
                files.setdefault(part["split"] if part else file.name.split(".")[0], []).append(file)
        if not files:
            raise FileNotFoundError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        for split, parts in files.items():
            _check_parts(path, split, parts)
        return files
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return {"train": [path]}


def _check_parts(folder: Path, split: str, files: list[Path]) -> None:
    parts = [part for file in files if (part := _PART.match(file.name)) is not None]
    if not parts and len(files) == 1:
        return
    counts = {int(part["count"]) for part in parts}
    if len(counts) != 1 or len(parts) < len(files):
        names = ", ".join(file.name for file in files)
        raise FileNotFoundError(f"{folder}: the files of split {split!r} do not belong together: {names}")
    (count,) = counts
    missing = set(range(count)) - {int(part["number"]) for part in parts}
    if missing:
        raise FileNotFoundError(f"{folder}: of split {split!r} the file number {min(missing)} of {count} is missing")


def load_pairs(
    path: Path | str | Sequence[Path | str],
    chat_template: bool = True,
    text_fields: TextFields = check_columns,
    ties: str = "error",
) -> Dataset:
    """Read and check a file of preference data, or several.

    A row of pairs holds ``chosen`` and ``rejected``, with or without ``prompt``: strings, or chats as lists of messages
    ``{"role", "content"}``. A ranked row holds ``prompt``, ``completions`` and ``scores`` or ``ranks``; other trainers'
    rows what `text_fields` says. ShareGPT's form (``conversations``, messages ``{"from", "value"}``) is turned into chats.
    Suffixes: .jsonl, .json (a list of rows), .csv, .parquet, the first three also with .gz. JSON Lines and Parquet are read
    a piece at a time, and many rows are kept on the disk, where `datasets` keeps what it computes, until the process ends.

    Args:
        path: the file, or files whose rows follow each other.
        chat_template: whether the tokenizer can take chats.
        text_fields: from the columns, the fields beside the prompt that hold text or messages; a trainer's `text_fields`.
        ties: see `RankedArguments`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, row and field, for whatever is wrong in it.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(each) for each in path]
    rows = _checked_rows([str(each) for each in paths], chat_template, text_fields, ties)
    name = _name_of(paths)
    piece = list(islice(rows, _ROWS_IN_MEMORY))
    if not piece:
        raise ValueError(f"{name}: there is no row in it")
    if len(piece) < _ROWS_IN_MEMORY:
        dataset = _as_dataset(piece, name)
    else:
        files = []
        while piece:
            files.append(_write(_as_dataset(piece, name).data.table, _folder() / f"{uuid.uuid4().hex}.arrow"))
            piece = list(islice(rows, _ROWS_IN_MEMORY))
        dataset = _joined(files, name)
    # Later messages about a row name the file by this.
    dataset.info.update(DatasetInfo(dataset_name=name))
    return dataset


def stream_pairs(
    paths: Sequence[Path], chat_template: bool = True, text_fields: TextFields = check_columns, ties: str = "error"
) -> IterableDataset:
    """As `load_pairs`, read and checked as it is asked for; workers share the files between them."""
    given = {"chat_template": chat_template, "text_fields": text_fields, "ties": ties}
    names = [str(path) for path in paths]
    stream = IterableDataset.from_generator(_checked_rows, gen_kwargs={"paths": names, **given})
    stream.info.update(DatasetInfo(dataset_name=_name_of(paths)))
    return stream


def _name_of(paths: Sequence[Path]) -> str:
    part = _PART.match(paths[0].name)
    return str(paths[0]) if part is None or len(paths) == 1 else f"{paths[0].parent}, {part['split']}"


def _checked_rows(
    paths: list[str], chat_template: bool, text_fields: TextFields, ties: str
) -> Iterator[dict[str, Any]]:
    """The rows of files, each checked."""
    kinds: dict[str, type] = {}
    fields: tuple[str, ...] = ()
    with_kwargs = without_kwargs = None
    for path in map(Path, paths):
        for where, given in rows_of(path):
            row = _normalise(given, where)
            if not fields:
                fields = text_fields(row, where)
            names = ("prompt", *fields, *COLUMNS)
            row = {name: row.get(name) for name in names if row.get(name) is not None or name in fields}
            check_example(row, where, chat_template, fields, ties)
            deep = next((name for name, value in row.items() if _list_depth(value) > _MOST_LISTS), None)
            if deep is not None:
                raise ValueError(f"{where}, field {deep!r}: more than {_MOST_LISTS} lists in each other")
            row |= {name: _found(row[name], path.parent) for name in IMAGE_COLUMNS if name in row}
            for name in ("prompt", *fields):
                kind = type(row.get(name))
                if kinds.setdefault(name, kind) is not kind:
                    raise ValueError(
                        f"{where}, field {name!r} is {_described(kind)}, in the rows before it {_described(kinds[name])}"
                    )
            # (None in some rows is what TRL does not take.)
            if "chat_template_kwargs" in row:
                with_kwargs = with_kwargs or where
            else:
                without_kwargs = without_kwargs or where
            if with_kwargs and without_kwargs:
                raise ValueError(
                    f"{without_kwargs}, field 'chat_template_kwargs' is missing, and other rows have it ({with_kwargs})"
                )
            yield row


def _as_dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    # (`Dataset.from_list` would keep the first row's fields only.)
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    try:
        return Dataset.from_dict(columns)
    except _NO_COLUMN as error:
        raise ValueError(f"{name}{_mixed(columns)}: no column can hold such values ({error})") from error


@functools.cache
def _folder() -> Path:
    """Where rows are kept until the process ends."""
    Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="preftree-rows-", dir=datasets.config.HF_DATASETS_CACHE))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write(table: pyarrow.Table, path: Path) -> Path:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def _joined(paths: list[Path], name: str) -> Dataset:
    """The rows of files as one data set; columns that some files have not, or have only nothing in, are filled up."""
    pieces = [Dataset.from_file(str(path)) for path in paths]
    schemas = [piece.data.schema.remove_metadata() for piece in pieces]
    try:
        schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
        for path, own in zip(paths, schemas, strict=True):
            if own != schema:
                rows = Dataset.from_file(str(path)).to_list()
                other = path.with_suffix(".whole")
                _write(pyarrow.Table.from_pylist(rows, schema), other)
                os.replace(other, path)
    except _NO_COLUMN as error:
        raise ValueError(f"{name}: no column can hold the values of all its rows ({error})") from error
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def _list_depth(value: Any) -> int:
    """How many lists are in each other; no more than one beyond `_MOST_LISTS` are counted."""
    depth, level = 0, [value]
    while level and depth <= _MOST_LISTS:
        inner = [each for values in level if isinstance(values, list) for each in values]
        inner += [each for values in level if isinstance(values, dict) for each in values.values()]
        depth += any(isinstance(values, list) for values in level)
        level = [each for each in inner if isinstance(each, (list, dict))]
    return depth


def _mixed(columns: dict[str, list[Any]]) -> str:
    """Where the first column that Arrow does not take changes its kind."""
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values})
        except _NO_COLUMN:
            kinds = [type(value) for value in values]
            first = next((kind for kind in kinds if kind is not type(None)), None)
            other = next((row for row, kind in enumerate(kinds) if kind not in (first, type(None))), None)
            return f", field {name!r}" if other is None else f", row {other}, field {name!r}"
    return ""


def _found(image: Any, folder: Path) -> Any:
    """An image, or images: a path, or ``{"bytes", "path"}``. Relative paths count from the data's folder."""
    if isinstance(image, list):
        return [_found(each, folder) for each in image]
    if isinstance(image, str) and "://" not in image:
        return str(folder / image)
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path") is not None:
        return {**image, "path": _found(image["path"], folder)}
    return image


def _described(kind: type) -> str:
    return {str: "a string", list: "a list", type(None): "missing"}.get(kind, kind.__name__)


def _normalise(row: dict[str, Any], where: str) -> dict[str, Any]:
    """ShareGPT's form as chats: ``conversations`` is the prompt, responses are messages; other rows as they are."""
    if "conversations" in row and "prompt" not in row:
        row = {**row, "prompt": row["conversations"]}
        for name in ("chosen", "rejected"):
            if isinstance(row.get(name), dict):
                row[name] = [row[name]]
    return {name: _as_chat(value, where, name) if name in TEXT_FIELDS else value for name, value in row.items()}


def _as_chat(value: Any, where: str, name: str) -> Any:
    if not isinstance(value, list) or not any(isinstance(message, dict) and "from" in message for message in value):
        return value
    messages = []
    for number, message in enumerate(value):
        role = _SHAREGPT_ROLES.get(str(message.get("from")) if isinstance(message, dict) else "")
        if role is None or not isinstance(message.get("value"), str):
            raise ValueError(
                f"{where}, field {name!r}, message {number}: 'from' must be one of {', '.join(_SHAREGPT_ROLES)} and "
                "'value' a string"
            )
        messages.append({"role": role, "content": message["value"]})
    return messages
