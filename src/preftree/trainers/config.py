"""What preftree's trainers can be told beyond TRL's arguments, and which options have an effect."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trl
import trl.experimental.cpo
import trl.experimental.orpo
import trl.experimental.tpo

from preftree.attention import BACKENDS
from preftree.models.compiled import check_memory_budget
from preftree.objectives import (
    CPO_LOSSES,
    DIVERGENCES,
    DPO_LOSSES,
    KTO_LOSSES,
    LIKELIHOOD_OPTION_READERS,
    MIXING,
    OPTION_READERS,
    TPO_LOSSES,
)
from preftree.trainers.groups import WEIGHTINGS
from preftree.trainers.options import check_options

OVERLONG = ("truncate", "drop", "error")
# The list objective: not a loss of TRL's, and none of pairs.
LIST_LOSS = "plackett_luce"


@dataclass
class TreeArguments:
    """Arguments of all trainers. ``per_device_train_batch_size`` is the examples of a micro-batch, as in TRL;
    ``row_length`` the tokens of one forward pass. Neither changes the meaning of the other: the examples are packed into
    as many rows as they need.
    """

    row_length: int | str | None = field(
        default=None,
        metadata={
            "help": "Tokens of a packed row: what one forward pass holds in memory. The examples of a micro-batch are "
            "packed into as many rows as they need; losses and gradients do not depend on it. None: one row. 'auto': as "
            "many as fit into the GPU's memory, tried when training begins (on a CPU one row)."
        },
    )
    overlong: str | None = field(
        default=None,
        metadata={
            "help": "What to do with an example longer than `max_length` or `row_length`: 'truncate', 'drop' or 'error'. "
            "None: do at `max_length` what TRL does, error at `row_length`.",
            "choices": [*OVERLONG, None],
        },
    )
    attention_backend: str = field(
        default="auto",
        metadata={
            "help": "Tree attention: 'auto' chooses by device, layer and row; 'flash', 'flex', 'varlen' or "
            "'dense' force one."
        },
    )
    compile_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Run the decoder layers under torch.compile, one compilation for all row lengths. None: on a GPU, and "
            "with `torch_compile`."
        },
    )
    activation_memory_budget: float = field(
        default=1.0,
        metadata={
            "help": "Share of what a compiled layer would keep for its backward pass that it may keep, from 0 to 1; the rest "
            "is computed again, what takes least operations first. For less memory without all of gradient_checkpointing."
        },
    )
    share_prefixes: bool = field(
        default=True,
        metadata={"help": "False computes every sequence by itself in the same packed rows: for comparison."},
    )

    def __post_init__(self):
        super().__post_init__()  # TRL's config stands behind this class
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for a setting that preftree does not know, or that no other one fits."""
        if isinstance(self.row_length, str) and self.row_length != "auto":
            try:
                self.row_length = int(self.row_length)
            except ValueError:
                raise ValueError(f"row_length must be a number or 'auto', got {self.row_length!r}") from None
        if isinstance(self.row_length, int) and self.row_length < 1:
            raise ValueError(f"row_length must be positive, got {self.row_length}")
        own: Any = self
        check_options(own)
        for name in ("gradient_accumulation_steps", "dataset_num_proc"):
            if (count := getattr(own, name, None)) is not None and count < 1:
                raise ValueError(f"{name} must be positive, got {count}")
        if self.row_length == "auto" and getattr(own, "deepspeed", None):
            raise ValueError("row_length='auto' tries rows outside DeepSpeed's own steps: give a number with DeepSpeed")
        check_memory_budget(self.activation_memory_budget)
        if self.activation_memory_budget < 1 and self.compiles_layers is False:
            raise ValueError(
                f"activation_memory_budget={self.activation_memory_budget} is about compiled layers: it cannot be combined "
                "with compile_layers=False or activation_offloading"
            )
        if self.compile_layers and getattr(own, "activation_offloading", False):
            raise ValueError(
                "compile_layers cannot be combined with activation_offloading: it gives activations back in another layout "
                "than the compiled backward pass was made for. Leave one of them out"
            )
        if self.overlong is not None and self.overlong not in OVERLONG:
            raise ValueError(f"unknown overlong {self.overlong!r}: choose 'truncate', 'drop' or 'error'")
        if self.attention_backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"unknown attention_backend {self.attention_backend!r}: choose from auto, {', '.join(BACKENDS)}"
            )

    @property
    def given_row_length(self) -> int | None:
        """`row_length` as a number, if it is one."""
        return self.row_length if isinstance(self.row_length, int) else None

    @property
    def compiles_layers(self) -> bool | None:
        """What `compile_layers` comes to, as `prepare_model` takes it: None leaves it to the device."""
        own: Any = self
        if self.compile_layers is not None:
            return self.compile_layers
        if getattr(own, "activation_offloading", False):
            return False
        return True if own.torch_compile or self.activation_memory_budget < 1 else None

    def unused_options(self) -> Iterator[tuple[str, str]]:
        """``(option, why)`` of options that are set but have no effect."""
        own: Any = self
        settings = getattr(own, "gradient_checkpointing_kwargs", None) or {}
        if self.activation_memory_budget < 1 and own.gradient_checkpointing and "every_n_layers" not in settings:
            yield "activation_memory_budget", "gradient_checkpointing=True computes whole layers again"

    def warn_of_unused_options(self) -> None:
        """Warn of each option that is set but has no effect."""
        for name, why in self.unused_options():
            warnings.warn(f"{name}={getattr(self, name)!r} has no effect: {why}", UserWarning, stacklevel=2)

    def _not_read(self, readers: Mapping[str, frozenset[str]], losses: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Options that are set and that none of the losses reads, ``readers`` being the losses that read each."""
        for name, reading in readers.items():
            if self._is_set(name) and not reading.intersection(losses):
                yield name, f"loss_type {', '.join(losses)} does not read it"

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != next(f.default for f in dataclasses.fields(self) if f.name == name)


@dataclass
class RankedArguments(TreeArguments):
    """Arguments of trainers that take ranked responses (`prompt`, `completions`, `scores` or `ranks`) as well as pairs."""

    pair_weighting: str = field(
        default="pair",
        metadata={
            "help": "How the pairs of a ranked example weigh: 'pair' (each counts 1, as if they were listed one by one), "
            "'prompt' (each prompt counts 1, as in InstructGPT's reward model) or 'lambda' (LiPO's weights, by scores).",
            "choices": list(WEIGHTINGS),
        },
    )
    ties: str = field(
        default="error",
        metadata={
            "help": "Ranked responses with equal scores: 'error', or 'drop' to make no pair of them.",
            "choices": ["error", "drop"],
        },
    )

    def check(self) -> None:
        super().check()
        if self.pair_weighting not in WEIGHTINGS:
            raise ValueError(f"unknown pair_weighting {self.pair_weighting!r}: choose from {', '.join(WEIGHTINGS)}")
        if self.ties not in ("error", "drop"):
            raise ValueError(f"unknown ties {self.ties!r}: choose 'error' or 'drop'")


@dataclass
class ReferenceArguments(TreeArguments):
    """Arguments of trainers that compare with a reference."""

    ref_logps_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where `precompute_ref_log_probs` keeps the reference's log-probabilities, by content (weights, "
            "tokens, precision). Default: beside the cache of Hugging Face's datasets."
        },
    )
    offload_reference: bool = field(
        default=False,
        metadata={
            "help": "Keep the reference model's layers in the host's memory: each comes to the GPU while the one before it "
            "runs. For where the memory of `ref_model` is wanted and `precompute_ref_log_probs` is not."
        },
    )

    def check(self) -> None:
        super().check()
        args: Any = self
        if self.offload_reference:
            for name, why in (
                ("sync_ref_model", "the reference's weights are moved towards the policy's on the GPU"),
                ("fsdp", "it has an offloading of its own"),
                ("deepspeed", "it has an offloading of its own"),
            ):
                if getattr(args, name, None):
                    raise ValueError(f"offload_reference cannot be combined with {name}: {why}. Leave one of them out")

    def unused_options(self) -> Iterator[tuple[str, str]]:
        yield from super().unused_options()
        args: Any = self
        for name in ("ref_logps_cache_dir", "precompute_ref_batch_size"):
            if self._is_set(name) and not args.precompute_ref_log_probs:
                yield name, "precompute_ref_log_probs is off"
        if self.offload_reference and args.precompute_ref_log_probs:
            yield "offload_reference", "with precompute_ref_log_probs no reference runs in training"
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if self._is_set(name) and not args.sync_ref_model:
                yield name, "sync_ref_model is off"


@dataclass
class DPOConfig(RankedArguments, ReferenceArguments, trl.DPOConfig):
    """TRL's `DPOConfig` with the same names and defaults, and the fields of `RankedArguments` and `ReferenceArguments`.

    ``loss_type`` also takes "plackett_luce", the list objective for ranked data.
    """

    def check(self) -> None:
        super().check()
        if not self.loss_type:
            raise ValueError("loss_type names no loss")
        for loss_type in self.loss_type:
            if loss_type not in DPO_LOSSES and loss_type != LIST_LOSS:
                known = ", ".join([*sorted(DPO_LOSSES), LIST_LOSS])
                raise ValueError(f"unknown loss_type {loss_type!r}: choose from {known}")
        if LIST_LOSS in self.loss_type:
            self._check_list_loss()
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError(f"loss_type 'exo_pair' needs 0 < label_smoothing < 1, got {self.label_smoothing}")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss_type 'robust' needs 0 <= label_smoothing < 0.5, got {self.label_smoothing}")
        if self.f_divergence_type not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise ValueError(f"unknown f_divergence_type {self.f_divergence_type!r}: choose from {known}")
        allowed = OPTION_READERS["f_divergence_type"] | {"sft"}
        if self.f_divergence_type != "reverse_kl" and (others := sorted(set(self.loss_type) - allowed)):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type!r} cannot be combined with loss_type {', '.join(others)}"
            )
        if mixing := ", ".join(sorted(MIXING.intersection(self.loss_type))):
            if self.use_weighting:
                raise ValueError(f"use_weighting=True cannot be combined with loss_type {mixing}")
            if self.pair_weighting != "pair":
                raise ValueError(
                    f"pair_weighting={self.pair_weighting!r} cannot be combined with loss_type {mixing}: sorting leaves no "
                    "pair that a weight belongs to"
                )

    def _check_list_loss(self) -> None:
        if len(self.loss_type) > 1:
            raise ValueError(f"loss_type {LIST_LOSS!r} is a loss of lists and cannot be mixed with losses of pairs")
        for name, off in (("ld_alpha", None), ("use_weighting", False), ("pair_weighting", "pair"), ("ties", "error")):
            if getattr(self, name) != off:
                raise ValueError(f"{name}={getattr(self, name)!r} is about pairs: loss_type {LIST_LOSS!r} has none")

    def unused_options(self) -> Iterator[tuple[str, str]]:
        yield from super().unused_options()
        yield from self._not_read(OPTION_READERS, self.loss_type)
        if self._is_set("f_alpha_divergence_coef") and self.f_divergence_type != "alpha_divergence":
            yield "f_alpha_divergence_coef", f"f_divergence_type is {self.f_divergence_type}"


def _likelihood_readers(gamma: str) -> dict[str, frozenset[str]]:
    """Which losses read which option of a config that calls the margin ``gamma``."""
    return {gamma if name == "gamma" else name: losses for name, losses in LIKELIHOOD_OPTION_READERS.items()}


@dataclass
class ORPOConfig(RankedArguments, trl.experimental.orpo.ORPOConfig):
    """TRL's `ORPOConfig` with the same names and defaults, and the fields of `RankedArguments`."""


@dataclass
class CPOConfig(RankedArguments, trl.experimental.cpo.CPOConfig):
    """TRL's `CPOConfig` with the same names and defaults, and the fields of `RankedArguments`."""

    def check(self) -> None:
        super().check()
        if self.loss_type not in CPO_LOSSES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}: choose from {', '.join(CPO_LOSSES)}, alphapo")

    def unused_options(self) -> Iterator[tuple[str, str]]:
        yield from super().unused_options()
        yield from self._not_read(_likelihood_readers("simpo_gamma"), [self.loss_type])


@dataclass
class TPOConfig(TreeArguments, trl.experimental.tpo.TPOConfig):
    """TRL's `TPOConfig` with the same names and defaults, and the fields of `TreeArguments`."""

    def check(self) -> None:
        super().check()
        if self.loss_type not in TPO_LOSSES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}: choose from {', '.join(TPO_LOSSES)}")

    def unused_options(self) -> Iterator[tuple[str, str]]:
        yield from super().unused_options()
        yield from self._not_read(_likelihood_readers("tpo_l_gamma"), [self.loss_type])


@dataclass
class KTOConfig(ReferenceArguments, trl.KTOConfig):
    """TRL's `KTOConfig` with the same names and defaults, the fields of `ReferenceArguments`, and the one below."""

    keep_prompts_together: bool = field(
        default=True,
        metadata={
            "help": "Put the answers to one prompt one behind the other, in the order of the prompts, so that a micro-batch "
            "holds them together and computes the prompt once; prompts with a single answer are an error. False leaves "
            "the data in TRL's order, where hardly anything is shared."
        },
    )

    def check(self) -> None:
        super().check()
        if self.loss_type not in KTO_LOSSES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}: choose from {', '.join(KTO_LOSSES)}")


@dataclass
class RewardConfig(RankedArguments, trl.RewardConfig):
    """TRL's `RewardConfig` with the same names and defaults, and the fields of `RankedArguments`."""


C = TypeVar("C", bound=TreeArguments)


def upgrade(args: Any, config_class: type[C]) -> C:
    """TRL's own config, for users who change only the trainer's import: ours with the defaults of our fields.

    Raises:
        TypeError: if it is the config of another trainer.
    """
    theirs = next(base for base in config_class.__mro__ if base.__module__.startswith("trl."))
    if not isinstance(args, theirs):
        raise TypeError(f"args must be a {config_class.__name__} (preftree's or TRL's), got {type(args).__name__}")
    config = config_class.__new__(config_class)
    fields = dataclasses.fields(config_class)
    vars(config).update({own.name: own.default for own in fields if not hasattr(args, own.name)})
    vars(config).update(vars(args))
    config.check()
    return config
