"""The last decoder layer at the tokens that are read: everything but its keys and values, which all of them need.

What follows attention in the last layer serves a token alone, and so do the norm and the head behind it. For a preference
pair three quarters of a row's tokens, its prompts, are read by nobody. A family's own code computes a layer for all tokens
or for none, so it runs twice: up to its attention, for keys and values, and then on the wanted tokens, whose queries meet
these keys. Whether a family's code bears that is tried when a model is prepared.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from preftree.attention import Attend, Scores
from preftree.models.compiled import stock_forward
from preftree.models.interface import RowMask


class _Reached(Exception):  # noqa: N818
    """Attention has been reached: nothing of the first run is needed behind it."""


@dataclass
class _Keys:
    """In place of attention in the first run: keeps keys and values."""

    kept: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        self.kept = [k_BGSD, v_BGSE]
        raise _Reached


@dataclass
class _AtTokens:
    """In place of attention in the second run: its ``N`` queries meet the keys of all tokens."""

    attend: Attend
    nodes: torch.Tensor
    keys: list[torch.Tensor]

    def __call__(
        self, q_BHND: torch.Tensor, k_BGND: torch.Tensor, v_BGNE: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        k_BGSD, v_BGSE = self.keys
        batch, heads, _, size = q_BHND.shape
        # Kernels take one query a token; those of the others are zeros, and so are the gradients of their outputs.
        q_BHSD = q_BHND.new_zeros((batch, heads, k_BGSD.shape[2], size)).index_copy(2, self.nodes, q_BHND)
        return self.attend(q_BHSD, k_BGSD, v_BGSE, scores).index_select(2, self.nodes)


def add_last_layer_hook(backbone: torch.nn.Module, num_layers: int) -> RemovableHandle | None:
    """Let the last of a backbone's layers run at `ActiveRow.wanted` tokens alone; None if it has no list of its layers."""
    lists = [part for part in backbone.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == num_layers]
    return lists[0][-1].register_forward_pre_hook(_at_wanted_tokens, with_kwargs=True) if lists else None


def _at_wanted_tokens(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A layer's arguments cut to the wanted tokens, with a mask that holds the keys of all."""
    mask = next((given for given in (*args, *kwargs.values()) if isinstance(given, RowMask)), None)
    if mask is None or mask.active.wanted is None or _checkpoints_reentrantly(layer):
        return None
    nodes, length = mask.active.wanted, len(mask.active.row)

    def with_mask(given: Any, other: RowMask) -> Any:
        return other if given is mask else given

    keys = _Keys()
    first = RowMask(mask.active, keys)
    arguments = [with_mask(given, first) for given in args]
    with suppress(_Reached):
        stock_forward(type(layer))(layer, *arguments, **{n: with_mask(given, first) for n, given in kwargs.items()})
    mask.active.cut = True
    second = RowMask(mask.active, _AtTokens(mask.attend, nodes, keys.kept), tokens=len(nodes))

    def cut(given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return _cut(given, nodes, length)
        return tuple(map(cut, given)) if type(given) is tuple else with_mask(given, second)

    return tuple(map(cut, args)), {name: cut(given) for name, given in kwargs.items()}


def _cut(given: torch.Tensor, nodes: torch.Tensor, length: int) -> torch.Tensor:
    """Of what has a value for each token ([S], [..., S], [..., S, D]), those of ``nodes``."""
    if given.ndim >= 3 and given.shape[-2] == length:
        return given.index_select(-2, nodes)
    if given.ndim in (1, 2) and given.shape[-1] == length:
        return given.index_select(-1, nodes)
    return given


def _checkpoints_reentrantly(layer: Any) -> bool:
    """Whether activation checkpointing would lose the gradient of keys that are no argument of the layer."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    on = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
    return bool(on and function is not None and getattr(function, "keywords", {}).get("use_reentrant", True))
