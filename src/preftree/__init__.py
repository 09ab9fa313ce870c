"""Exact prefix sharing for training language models on preference pairs."""

from preftree.logprobs import SequenceLogps, sequence_logps
from preftree.models import prepare_model
from preftree.packing import PackedRow, pack
from preftree.trainers.config import DPOConfig
from preftree.trainers.dpo import DPOTrainer
from preftree.tree import TokenTree
from preftree.version import __version__

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "PackedRow",
    "SequenceLogps",
    "TokenTree",
    "__version__",
    "pack",
    "prepare_model",
    "sequence_logps",
]
