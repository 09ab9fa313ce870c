"""Reference log-probabilities on disk, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

_FORMAT = "preftree reference log-probabilities 2"


def content_key(model_hash: str, examples: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """SHA-256 over all that the values depend on: weights, every token, and the settings of the pass.

    Args:
        model_hash: hash of the reference's weights.
        examples: the tokenised columns that the values are computed from, in order.
        settings: what else changes the values: configuration, truncation, weighting, precision, versions.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([_FORMAT, model_hash, dict(settings)], sort_keys=True).encode())
    for example in examples:
        for field in sorted(example):
            value = example[field]
            lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
            digest.update(f"{field} {len(lists)}".encode())
            for numbers in lists:
                array = np.asarray(numbers)
                digest.update(f"{array.dtype} {array.size}".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()


def hash_gathered(model: torch.nn.Module) -> str:
    """SHA-256 of weights that DeepSpeed's ZeRO-3 has shared out, gathered one by one; all ranks call it, and get the same."""
    import deepspeed

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        with deepspeed.zero.GatheredParameters([parameter]):
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def arithmetic_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a model's configuration may change its numbers: all but its name and the versions it was written with."""
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("_name_or_path", "transformers_version")
    }


def load(path: Path, key: str, examples: int) -> dict[str, torch.Tensor] | None:
    """The cached columns, fp32 ``[examples]`` or ``[examples, most responses]``, or None if there are none that fit."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileNotFoundError, SafetensorError):
        return None
    digest = _digest(columns)
    if metadata.get("key") != key or metadata.get("digest") != digest:
        return None
    return columns if all(len(column) == examples for column in columns.values()) else None


def save(path: Path, key: str, columns: Mapping[str, torch.Tensor]) -> None:
    """Write the columns under their final name only when they are complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(dict(columns), temporary, metadata={"key": key, "digest": _digest(columns)})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(columns: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(columns[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def default_directory() -> Path:
    """Where Hugging Face's `datasets` keeps what it computes."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "preftree_ref_logps"


def join(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The columns from what the batches gave; tables of different widths are filled up with NaN."""
    columns = {}
    for name in parts[0]:
        values = [part[name].float().cpu() for part in parts]
        if values[0].ndim == 2:
            width = max(table.shape[1] for table in values)
            pad = torch.nn.functional.pad
            values = [pad(table, (0, width - table.shape[1]), value=float("nan")) for table in values]
        columns[name] = torch.cat(values)
    return columns


def rows_of(column: torch.Tensor) -> list[Any]:
    """A column for a data set: numbers, or a list of numbers for each example."""
    if column.ndim == 1:
        return column.tolist()
    return [values[~values.isnan()].tolist() for values in column]
