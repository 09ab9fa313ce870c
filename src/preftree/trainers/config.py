"""What preftree's trainers can be told beyond TRL's arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import trl

from preftree.attention import BACKENDS
from preftree.objectives import DPO_LOSSES

OVERLONG = ("truncate", "drop", "error")


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's `DPOConfig` with the same names and defaults, and the fields below.

    ``per_device_train_batch_size`` is the pairs of a micro-batch, as in TRL; ``row_length`` the tokens of one forward pass.
    Neither changes the meaning of the other: the pairs are packed into as many rows as they need.
    """

    row_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a packed row: what one forward pass holds in memory. The pairs of a micro-batch are "
            "packed into as many rows as they need; losses and gradients do not depend on it. None: one row."
        },
    )
    overlong: str | None = field(
        default=None,
        metadata={
            "help": "What to do with a pair longer than `max_length` or `row_length`: 'truncate', 'drop' or 'error'. "
            "None: cut at `max_length` as TRL does, error at `row_length`.",
            "choices": [*OVERLONG, None],
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={"help": "Tree attention: 'auto' chooses by device; 'dense', 'flex' or 'varlen' force one."},
    )
    share_prefixes: bool = field(
        default=True,
        metadata={"help": "False computes every sequence by itself in the same packed rows: for comparison."},
    )
    ref_logps_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where `precompute_ref_log_probs` keeps the reference's log-probabilities, by content (weights, "
            "tokens, precision). Default: beside the cache of Hugging Face's datasets."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for a setting that preftree does not know."""
        for loss_type in self.loss_type:
            if loss_type not in DPO_LOSSES:
                raise ValueError(f"unknown loss_type {loss_type!r}: choose from {', '.join(sorted(DPO_LOSSES))}")
        if self.row_length is not None and self.row_length < 1:
            raise ValueError(f"row_length must be positive, got {self.row_length}")
        if self.overlong is not None and self.overlong not in OVERLONG:
            raise ValueError(f"unknown overlong {self.overlong!r}: choose 'truncate', 'drop' or 'error'")
        if self.attention_backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"unknown attention_backend {self.attention_backend!r}: choose from auto, {', '.join(BACKENDS)}"
            )


def upgrade(args: trl.DPOConfig) -> DPOConfig:
    """TRL's own config, for users who change only the trainer's import: ours with the defaults of our fields."""
    config = DPOConfig.__new__(DPOConfig)
    vars(config).update({own.name: own.default for own in fields(DPOConfig) if not hasattr(args, own.name)})
    vars(config).update(vars(args))
    config.check()
    return config
