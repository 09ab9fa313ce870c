"""Preference files: JSON Lines, JSON, CSV and Parquet, with errors that name file, row and field."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetInfo

from preftree.trainers.checks import IMAGE_COLUMNS, TEMPLATE_COLUMNS, check_columns, check_example

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# What trainers read besides text; other columns are left out, whatever they hold.
COLUMNS = (
    "completions",
    "scores",
    "ranks",
    "pair_weights",
    "label",
    "margin",
    *TEMPLATE_COLUMNS,
    *IMAGE_COLUMNS,
)
# In each other: what `datasets` does to a column doubles with each.
_MOST_LISTS = 12
# What a column raises for values that it cannot hold.
_NO_COLUMN = (pyarrow.ArrowException, TypeError, OverflowError)
_TEXT = ("prompt", "chosen", "rejected", "reference", "completion")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def is_local(name: str) -> bool:
    """Whether a dataset's name means files here rather than a name on the Hub."""
    return Path(name).exists() or _suffix(Path(name)) in SUFFIXES


def find_files(name: str) -> dict[str, Path]:
    """Splits of a local data set: a file is its "train"; in a folder each file is the split it is named after.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no file of a known kind in it.
    """
    path = Path(name)
    if path.is_dir():
        files = {file.name.split(".")[0]: file for file in sorted(path.iterdir()) if _suffix(file) in SUFFIXES}
        if not files:
            raise FileNotFoundError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return {"train": path}


TextFields = Callable[[Iterable[str], str], tuple[str, ...]]


def load_pairs(
    path: Path | str, chat_template: bool = True, text_fields: TextFields = check_columns, ties: str = "error"
) -> Dataset:
    """Read and check a file of preference data.

    A row of pairs holds ``chosen`` and ``rejected``, with or without ``prompt``: strings, or chats as lists of messages
    ``{"role", "content"}``. A ranked row holds ``prompt``, ``completions`` and ``scores`` or ``ranks``; other trainers'
    rows what `text_fields` says. ShareGPT's form (``conversations``, messages ``{"from", "value"}``) is turned into chats.
    Suffixes: .jsonl, .json (a list of rows), .csv, .parquet, the first three also with .gz.

    Args:
        path: the file.
        chat_template: whether the tokenizer can take chats.
        text_fields: from the columns, the fields beside the prompt that hold text or messages; a trainer's `text_fields`.
        ties: see `RankedArguments`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, row and field, for whatever is wrong in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}.get(
        _suffix(path)
    )
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    rows: list[dict[str, Any]] = []
    kinds: dict[str, type] = {}
    fields: tuple[str, ...] = ()
    for where, row in reader(path):
        row = _normalise(row, where)
        if not rows:
            fields = text_fields(row, where)
        names = ("prompt", *fields, *COLUMNS)
        row = {name: row.get(name) for name in names if row.get(name) is not None or name in fields}
        check_example(row, where, chat_template, fields, ties)
        if (deep := next((name for name, value in row.items() if _list_depth(value) > _MOST_LISTS), None)) is not None:
            raise ValueError(f"{where}, field {deep!r}: more than {_MOST_LISTS} lists in each other")
        row |= {name: _found(row[name], path.parent) for name in IMAGE_COLUMNS if name in row}
        for name in ("prompt", *fields):
            kind = type(row.get(name))
            if kinds.setdefault(name, kind) is not kind:
                raise ValueError(
                    f"{where}, field {name!r} is {_described(kind)}, in the rows before it {_described(kinds[name])}"
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: there is no row in it")
    if any("chat_template_kwargs" in row for row in rows):  # None in the others, which TRL does not take
        for number, row in enumerate(rows):
            if "chat_template_kwargs" not in row:
                raise ValueError(
                    f"{path}, row {number}, field 'chat_template_kwargs' is missing, and other rows have it"
                )
    # (`Dataset.from_list` would keep the first row's fields only.)
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    try:
        dataset = Dataset.from_dict(columns)
    except _NO_COLUMN as error:
        raise ValueError(f"{path}{_mixed(columns)}: no column can hold such values ({error})") from error
    # Later messages about a row name the file by this.
    dataset.info.update(DatasetInfo(dataset_name=str(path)))
    return dataset


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


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            return gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    return data


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: invalid UTF-8 at byte {error.start} (0x{data[error.start]:02x})") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    data = _bytes(path)
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        text = _text(line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            torn = number == len(lines)
            hint = " (the last line has no newline: is the file torn?)" if torn else ""
            raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}{hint}") from error
        except RecursionError as error:
            raise ValueError(f"{where}: lists or objects in each other, too many to read") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object with fields, not {type(row).__name__}")
        yield where, row


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_text(_bytes(path), str(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: lists or objects in each other, too many to read") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: must hold a list of rows, not {type(rows).__name__} (one row a line? name it .jsonl)"
        )
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object with fields, not {type(row).__name__}")
        yield where, row


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(_text(_bytes(path), str(path)), newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader):
            where = f"{path}, row {number} (line {reader.line_num})"
            if None in row or None in row.values():
                raise ValueError(f"{where}: {len(reader.fieldnames or ())} columns in the header, another number here")
            yield where, dict(row)
    except csv.Error as error:
        raise ValueError(f"{path}, behind row {number}: not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


def _normalise(row: dict[str, Any], where: str) -> dict[str, Any]:
    """ShareGPT's form as chats: ``conversations`` is the prompt, responses are messages; other rows as they are."""
    if "conversations" in row and "prompt" not in row:
        row = {**row, "prompt": row["conversations"]}
        for name in ("chosen", "rejected"):
            if isinstance(row.get(name), dict):
                row[name] = [row[name]]
    return {name: _as_chat(value, where, name) if name in _TEXT else value for name, value in row.items()}


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
