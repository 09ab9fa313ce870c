"""The last decoder layer at the tokens that are read: everything but its keys and values, which all of them need.

What follows attention in the last layer serves a token alone, and so do the norm and the head behind it. For a preference
pair three quarters of a row's tokens, its prompts, are read by nobody. A family's own code computes a layer for all tokens
or for none, so it runs twice: up to its attention, for keys and values, and then on the wanted tokens, whose queries meet
these keys. Whether a family's code bears that is tried when a model is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from preftree.attention import Scores
from preftree.attention.passes import Gradients
from preftree.models.compiled import keys_of
from preftree.models.interface import RowMask


@dataclass
class _AtTokens:
    """In place of attention in the second run: its ``N`` queries meet the keys of all tokens."""

    attend: Any
    nodes: torch.Tensor

    @property
    def rule(self) -> Any:
        return self.attend.rule

    def __call__(
        self, q_BHND: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        q_BHSD = self._spread(q_BHND, k_BGSD.shape[2])
        return self.attend(q_BHSD, k_BGSD, v_BGSE, scores).index_select(2, self.nodes)

    def forward(
        self, q_BHND: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_BHSD = self._spread(q_BHND, k_BGSD.shape[2])
        out_BHSE, lse_BHS = self.attend.forward(q_BHSD, k_BGSD, v_BGSE, scores)
        return out_BHSE.index_select(2, self.nodes), lse_BHS

    def backward(self, grad_BHNE, q_BHND, k_BGSD, v_BGSE, out_BHNE, lse_BHS, scores: Scores) -> Gradients:
        grad, q, out = (self._spread(x, k_BGSD.shape[2]) for x in (grad_BHNE, q_BHND, out_BHNE))
        dq, *others = self.attend.backward(grad, q, k_BGSD, v_BGSE, out, lse_BHS, scores)
        return dq.index_select(2, self.nodes), *others

    def _spread(self, x_BHND: torch.Tensor, length: int) -> torch.Tensor:
        """Kernels take one query a token; those of the others are zeros, and so are the gradients of their outputs."""
        batch, heads, _, size = x_BHND.shape
        x_BSHD = x_BHND.new_zeros((batch, length, heads, size)).index_copy(1, self.nodes, x_BHND.transpose(1, 2))
        return x_BSHD.transpose(1, 2)


def add_last_layer_hook(layers: torch.nn.ModuleList | None) -> RemovableHandle | None:
    """Let the last of a model's layers run at `ActiveRow.wanted` tokens alone; None if it has no list of its layers."""
    return None if layers is None else layers[-1].register_forward_pre_hook(_at_wanted_tokens, with_kwargs=True)


def _at_wanted_tokens(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """A layer's arguments cut to the wanted tokens, with a mask that holds the keys of all."""
    mask = next((given for given in (*args, *kwargs.values()) if isinstance(given, RowMask)), None)
    if mask is None or mask.active.wanted is None or _checkpoints_reentrantly(layer):
        return None
    nodes, length = mask.active.wanted, len(mask.active.row)

    def with_mask(given: Any, other: RowMask) -> Any:
        return other if given is mask else given

    first = mask.but(wants_keys=True)
    arguments = [with_mask(given, first) for given in args]
    keys = keys_of(layer)(layer, *arguments, **{name: with_mask(given, first) for name, given in kwargs.items()})
    mask.active.cut = True
    # One for all times: activation checkpointing runs the layer again, and compares what it is given.
    mask.at_wanted = mask.at_wanted or RowMask(mask.active, _AtTokens(mask.attend, nodes), nodes)
    second = mask.at_wanted.but(keys=keys)

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
    # Whether gradients are asked for says nothing: such a checkpoint runs the layer without them first.
    function = getattr(layer, "_gradient_checkpointing_func", None)
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return bool(on and function is not None and getattr(function, "keywords", {}).get("use_reentrant", True))
