"""Rotary embeddings whose frequencies depend on how long a sequence is: each sequence of a row gets those of its length.

transformers finds the length as the largest position of a batch: sequences of a batch change each other, and so would those
of a row. LongRoPE (arXiv 2402.13753) has one set of frequencies up to a limit and another one beyond it. Those of "dynamic"
NTK scaling change with every token beyond it, and what they are depends on what the model has seen before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from preftree.models.replaced import hooked
from preftree.packing import PackedRow


@dataclass(frozen=True)
class RotaryLimit:
    """Sequences of at most so many tokens have the frequencies that they have in any batch."""

    rope_type: str
    tokens: int

    @property
    def may_be_longer(self) -> bool:
        """Whether longer sequences have frequencies that do not depend on anything else."""
        return self.rope_type == "longrope"

    def divides(self, lengths: Iterable[int]) -> bool:
        """Whether sequences of these lengths have different frequencies: they can share no token."""
        return len({length > self.tokens for length in lengths}) > 1


def rotary_limits(config: PreTrainedConfig) -> set[RotaryLimit]:
    """Of all kinds of layers; none where frequencies are the same at any length.

    Raises:
        ValueError: if a configuration does not say where the limit lies.
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = set()
    for each in (parameters, *parameters.values()):
        rope_type = each.get("rope_type") if isinstance(each, dict) else None
        if not isinstance(rope_type, str) or not changes_with_length(rope_type):
            continue
        limit = config.max_position_embeddings
        if rope_type == "longrope":
            limit = each.get("original_max_position_embeddings")
        if not isinstance(limit, int):
            raise ValueError(f"rope_type={rope_type!r} without a length that its frequencies change at")
        limits.add(RotaryLimit(rope_type, limit))
    return limits


def rotary_limit(config: PreTrainedConfig) -> RotaryLimit | None:
    """That of a model that is not refused: it has one, or none."""
    return next(iter(rotary_limits(config)), None)


def changes_with_length(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def rotary_parts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Modules whose frequencies change with length."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(isinstance(kind, str) and changes_with_length(kind) for kind in kinds):
            yield module


def by_length(limit: RotaryLimit | None, parts: list[torch.nn.Module], row: PackedRow) -> AbstractContextManager[None]:
    """While inside, these modules give each token of a row the frequencies of the sequences that it belongs to.

    Raises:
        ValueError: if a token belongs to sequences with different frequencies, or one is longer than frequencies are known.
    """
    if limit is None or row.longest_sequence <= limit.tokens:
        return nullcontext()
    if not limit.may_be_longer:
        raise ValueError(
            f"a sequence of {row.longest_sequence} tokens: with rope_type={limit.rope_type!r} the frequencies beyond "
            f"{limit.tokens} tokens depend on what the model has seen before; keep sequences to {limit.tokens} (max_length)"
        )
    if not limit.divides((row.shortest_sequence, row.longest_sequence)):
        return nullcontext()
    is_long = row.sequence_lengths > limit.tokens
    through_long, through_short = (_through(row, row.last_nodes[chosen]) for chosen in (is_long, ~is_long))
    if bool((through_long & through_short).any()):
        raise ValueError(
            f"sequences of {row.shortest_sequence} to {row.longest_sequence} tokens share some, but with "
            f"rope_type={limit.rope_type!r} their frequencies change at {limit.tokens}: give such trees as "
            "`TokenTree.unshared()`"
        )

    def choose(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        values = {"position_ids": args[1]} | kwargs if len(args) > 1 else dict(kwargs)
        values["position_ids"] = values["position_ids"].clamp(max=limit.tokens - 1)
        short = module.forward(*args[:1], *args[2:], **values)
        if isinstance(output, torch.Tensor):
            return _at(through_long, output, short)
        return tuple(_at(through_long, *both) for both in zip(output, short, strict=True))

    return hooked(part.register_forward_hook(choose, with_kwargs=True) for part in parts)


def _through(row: PackedRow, last_nodes: torch.Tensor) -> torch.Tensor:
    """Bool ``[S]``: the tokens of the sequences that end at these nodes."""
    ends = torch.zeros(len(row) + 1, dtype=torch.long, device=row.device)
    ends[1:].index_add_(0, last_nodes, torch.ones_like(last_nodes))
    before = ends.cumsum(0)
    return before[row.end] > before[:-1]


def _at(chosen_S: torch.Tensor, there: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    """``[B, S, ...]``, from one tensor at the chosen tokens, from the other at the rest."""
    return torch.where(chosen_S.view(1, -1, *[1] * (there.ndim - 2)), there, elsewhere)
