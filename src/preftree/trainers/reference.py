"""Reference log-probabilities on disk, found again by what they were computed from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

_FORMAT = "preftree reference log-probabilities 1"


def content_key(model_hash: str, examples: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """SHA-256 over all that the values depend on: weights, every token, and the settings of the pass.

    Args:
        model_hash: hash of the reference's weights.
        examples: tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), in order.
        settings: what else changes the values: configuration, truncation, weighting, precision, versions.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([_FORMAT, model_hash, dict(settings)], sort_keys=True).encode())
    for example in examples:
        for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = torch.tensor(example[field], dtype=torch.int64)
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def arithmetic_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a model's configuration may change its numbers: all but its name and the versions it was written with."""
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name not in ("_name_or_path", "transformers_version")
    }


def load(path: Path, key: str, pairs: int) -> dict[str, torch.Tensor] | None:
    """The cached columns, fp32 ``[pairs]`` each, or None if there are none that fit."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (FileNotFoundError, SafetensorError):
        return None
    digest = _digest(columns)
    if metadata.get("key") != key or metadata.get("digest") != digest:
        return None
    return columns if all(column.shape == (pairs,) for column in columns.values()) else None


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


def columns_of(chosen: Sequence[torch.Tensor], rejected: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The two columns from what the batches gave."""
    return {
        "ref_chosen_logps": torch.cat(list(chosen)).float().cpu(),
        "ref_rejected_logps": torch.cat(list(rejected)).float().cpu(),
    }
