"""Exact prefix sharing for training language models on preference pairs."""

from typing import TYPE_CHECKING, Any

from preftree.logprobs import SequenceLogps, sequence_logps
from preftree.models import prepare_model
from preftree.packing import PackedRow, pack
from preftree.sharing import PrefixSharing, share_prefixes
from preftree.tree import TokenTree
from preftree.version import __version__

if TYPE_CHECKING:
    from preftree.trainers.config import DPOConfig
    from preftree.trainers.dpo import DPOTrainer

# The trainers bring TRL with them, which takes seconds to import: only for those who ask.
_TRAINERS = {"DPOConfig": "preftree.trainers.config", "DPOTrainer": "preftree.trainers.dpo"}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PackedRow",
    "PrefixSharing",
    "SequenceLogps",
    "TokenTree",
    "__version__",
    "pack",
    "prepare_model",
    "sequence_logps",
    "share_prefixes",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_TRAINERS[name]), name)
