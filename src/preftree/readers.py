"""Rows of JSON Lines, JSON, CSV and Parquet files, plain or (but for Parquet) gzipped, with where they stand."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preftree.trainers.columns import COLUMNS, TEXT_FIELDS


def suffix_of(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file's rows, each with its place for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown kind of file, or one that is damaged, with line or row and, where there is one, field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read = _READERS.get(suffix_of(path))
    if read is None:
        raise ValueError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
    yield from read(path)


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


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, one after the other, each with its newline."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        if not path.name.endswith(".gz"):
            raise
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {max(names, key=names.count)!r} is there twice")
    return found


def _check_names(names: Sequence[str], path: Path) -> None:
    """That each column that is read is there once."""
    for name in (*TEXT_FIELDS, *COLUMNS):
        if names.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} is there twice")


def _parsed(text: str, where: str, lines: bool = False, hint: str = "") -> Any:
    """JSON whose objects have each name once; of several ``lines`` messages name one."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if lines else ""
        raise ValueError(f"{where}{line}: not valid JSON: {error.msg} at column {error.colno}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: lists or objects in each other, too many to read") from error
    except ValueError as error:  # a name that is there twice, a number with thousands of digits
        raise ValueError(f"{where}: {error}") from error


def _half(text: str) -> bool:
    """Whether halves of characters may be written in JSON."""
    return "\\ud" in text or "\\uD" in text


def _as_row(value: Any, where: str, escapes: bool) -> dict[str, Any]:
    """A row that JSON holds; with ``escapes`` there may be halves of characters in it."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be an object with fields, not {type(value).__name__}")
    if escapes:
        for name, field in value.items():
            try:
                json.dumps(field, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise ValueError(f"{where}, field {name!r}: {half} is half of a character in UTF-16") from error
    return value


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        text = _text(line, where)
        if not text.strip():
            continue
        hint = "" if line.endswith(b"\n") else " (the last line has no newline: is the file torn?)"
        yield where, _as_row(_parsed(text, where, hint=hint), where, _half(text))


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _text(_bytes(path), str(path))
    rows = _parsed(text, str(path), lines=True)
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: must hold a list of rows, not {type(rows).__name__} (one row a line? name it .jsonl)"
        )
    escapes = _half(text)
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where, escapes)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(_text(_bytes(path), str(path)), newline=""), strict=True)
    number = 0
    try:
        _check_names(reader.fieldnames or (), path)
        for number, row in enumerate(reader):
            where = f"{path}, row {number} (line {reader.line_num})"
            if None in row or None in row.values():
                raise ValueError(f"{where}: {len(reader.fieldnames or ())} columns in the header, another number here")
            yield where, dict(row)
    except csv.Error as error:
        raise ValueError(f"{path}, behind row {number}: not valid CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_names(file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
