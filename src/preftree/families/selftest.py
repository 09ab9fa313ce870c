"""The first use of a family that nobody has tried: a tiny twin of it is, with its windows and chunks made short.

A model itself is tried when it is prepared, on some thirty tokens. What depends on a token's place in the row from some
thousand tokens on does not show there; in a twin it mostly does. Families that the census has found exact, in this release of
transformers or a later one, need no such trial.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

from preftree.cache import cache_folder
from preftree.families import census
from preftree.models.prepare import prepare_model, reason_of
from preftree.models.twins import NotTiny, is_twin, random_model, tiny_config, torch_code
from preftree.version import __version__

# What no rounding explains.
_WRONG = 1e-3


@cache
def _known() -> frozenset[str]:
    """Families that need no trial."""
    found = json.loads(files(__package__).joinpath("exact.json").read_text(encoding="utf-8"))
    tried = Version(found["transformers"]).release[:2] >= Version(transformers.__version__).release[:2]
    return frozenset(found["exact"]) if tried else frozenset()


def what_is_wrong(model: PreTrainedModel) -> str | None:
    """What a tiny twin of a model computes otherwise than the stock code; None if nothing does, or no twin can be made.

    Kept on the disk, by releases of all that takes part and by the twin's configuration.
    """
    ours = type(model).__module__.startswith("transformers.")
    if is_twin(model) or (ours and model.config.model_type in _known()) or model.get_output_embeddings() is None:
        return None
    try:
        config = tiny_config(model.config)
    except NotTiny:
        return None
    path = _kept_at(type(model), config)
    if path is not None and path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))["wrong"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # torn or of another kind: it is tried again
    try:
        stock = random_model(type(model), config)
    except NotTiny:
        return None
    wrong = _try(stock)
    if path is not None:
        _keep(path, {"family": model.config.model_type, "wrong": wrong})
    return wrong


def _try(stock: PreTrainedModel) -> str | None:
    settings = "a tiny random model with its settings, windows and chunks shorter than the text,"
    try:
        with warnings.catch_warnings(), torch.enable_grad(), torch_code():
            warnings.simplefilter("ignore")
            logps, gradients = census.differences(stock, prepare_model(copy.deepcopy(stock)))
    except NotImplementedError as error:
        return f"{settings} is refused: {reason_of(error)}"
    except Exception:  # it cannot be tried, which says nothing of the model itself
        return None
    if logps <= _WRONG and gradients <= _WRONG:
        return None
    return (
        f"{settings} gives other results than the stock code: relative to these, log-probabilities differ by {logps:.1g}, "
        f"gradients by {gradients:.1g}"
    )


def _kept_at(model_class: type, config: PreTrainedConfig) -> Path | None:
    """The file for a twin's trial; None without a folder to write to."""
    if (folder := cache_folder("families")) is None:
        return None
    kind = f"{model_class.__module__}.{model_class.__qualname__}"
    versions = (__version__, torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr((kind, versions, config.to_json_string())).encode()).hexdigest()
    return folder / f"{config.model_type}-{key[:32]}.json"


def _keep(path: Path, found: dict[str, str | None]) -> None:
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(file.name, path)
    except OSError:
        pass  # it is tried again next time
