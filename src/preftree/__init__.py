"""Exact prefix sharing for training language models on preference pairs."""

from typing import TYPE_CHECKING, Any

from preftree.images import PromptImages
from preftree.logprobs import SequenceLogps, sequence_logps
from preftree.models import prepare_model
from preftree.packing import PackedRow, pack
from preftree.rewards import sequence_rewards
from preftree.sharing import PrefixSharing, share_prefixes
from preftree.tree import TokenTree
from preftree.version import __version__

if TYPE_CHECKING:
    from preftree.trainers.config import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig, TPOConfig
    from preftree.trainers.cpo import CPOTrainer
    from preftree.trainers.dpo import DPOTrainer
    from preftree.trainers.kto import KTOTrainer
    from preftree.trainers.orpo import ORPOTrainer
    from preftree.trainers.reward import RewardTrainer
    from preftree.trainers.tpo import TPOTrainer

# The trainers bring TRL with them, which takes seconds to import: only for those who ask.
_METHODS = ("DPO", "ORPO", "CPO", "TPO", "KTO", "Reward")
_TRAINERS = {f"{method}Config": "preftree.trainers.config" for method in _METHODS}
_TRAINERS |= {f"{method}Trainer": f"preftree.trainers.{method.lower()}" for method in _METHODS}

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PackedRow",
    "PrefixSharing",
    "PromptImages",
    "RewardConfig",
    "RewardTrainer",
    "SequenceLogps",
    "TPOConfig",
    "TPOTrainer",
    "TokenTree",
    "__version__",
    "pack",
    "prepare_model",
    "sequence_logps",
    "sequence_rewards",
    "share_prefixes",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_TRAINERS[name]), name)
