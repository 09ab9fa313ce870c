"""The visibility rule as attention: one function chooses the backend.

Shapes: ``B`` batch (always 1: a row), ``H`` query heads, ``G`` key-value heads, ``S`` row length, ``D`` head size of
queries and keys, ``E`` head size of values.

Every backend is a module with two functions. ``bind(row, rule) -> attend`` makes what the backend needs of the row;
``attend(q_BHSD, k_BGSD, v_BGSE, scores) -> out_BHSE`` is for the layers to call. ``refusal(layer) -> str | None`` says why
it cannot serve a layer. What a layer adds to plain attention is in :class:`~preftree.attention.scores.Scores`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import torch

from preftree.attention import cost, dense, flash, flex, passes, varlen
from preftree.attention.layer import Layer
from preftree.attention.mask import CAUSAL, Rule
from preftree.attention.scores import Scores
from preftree.packing import PackedRow

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]

BACKENDS: dict[str, ModuleType] = {"dense": dense, "flex": flex, "flash": flash, "varlen": varlen}


def check_backend(name: str, device: torch.device) -> None:
    """Raise for a backend that is none, or that can serve no layer on a device.

    Raises:
        ValueError: for a name that is no backend.
        NotImplementedError: for a backend forced on a device that it cannot train on.
    """
    if name == "auto":
        return
    backend = _named(name)
    usual = Layer(device.type, _capability(device), torch.bfloat16, 8, 8, 64, 64, CAUSAL)
    if (reason := backend.refusal(usual)) is not None:
        raise NotImplementedError(f"backend {name!r} cannot be used on {device.type!r}: {reason}")


def _named(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: choose from 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]


def choose_backend(name: str, layer: Layer, row: PackedRow) -> str:
    """The backend for a layer and a row: ``name`` itself, or for "auto" the one that should train it fastest.

    The choice is the same with and without gradients, so that a policy and its reference round alike.

    Raises:
        ValueError: for a name that is no backend.
        NotImplementedError: for a backend forced on a layer that it cannot serve, with the reason.
    """
    if name != "auto":
        if (reason := _named(name).refusal(layer)) is not None:
            raise NotImplementedError(f"backend {name!r} cannot serve this layer: {reason}. Use 'auto'")
        return name
    if layer.device != "cuda":
        return "varlen" if varlen.refusal(layer) is None else "dense"
    # In a tie the first is taken: paths round gradients twice where heads are not grouped. FlexAttention, which compiles for
    # each length of rows, is seldom faster than flash and never by much.
    candidates = ("flash", "varlen") if flash.refusal(layer) is None else ("varlen", "flex")
    able = [backend for backend in candidates if BACKENDS[backend].refusal(layer) is None]
    if able in ([], ["varlen"]):
        _warn_of_fallback(layer)
    able = able or ["dense"]
    chosen = cost.fastest(able, layer, row)
    return "varlen" if chosen == "flash" and not flash.works(layer, row.device) else chosen


def may_use_flex(name: str, device: torch.device) -> bool:
    """Whether layers on a device may be served by FlexAttention, which wants to be compiled with a row's static length."""
    if name == "auto":
        usual = Layer(device.type, _capability(device), torch.bfloat16, 8, 8, 64, 64, CAUSAL)
        return flash.refusal(usual) is not None and flex.refusal(usual) is None
    return name == "flex"


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


_warned: set[str] = set()


def _warn_of_fallback(layer: Layer) -> None:
    """Say once for each reason that no kernel made for trees serves a layer."""
    reasons = f"flash: {flash.refusal(layer)}; flex: {flex.refusal(layer)}"
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(
            f"no kernel for trees can serve this layer, torch computes its attention ({reasons})",
            stacklevel=2,
        )


def as_autocast(
    q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, under autocast cast as scaled dot-product attention casts them."""
    device = q_BHSD.device.type
    if not torch.is_autocast_enabled(device):
        return q_BHSD, k_BGSD, v_BGSE
    dtype = torch.get_autocast_dtype(device)
    return q_BHSD.to(dtype), k_BGSD.to(dtype), v_BGSE.to(dtype)


class TreeAttention:
    """Attention bound to a row and a family's rule, for the layers of one forward pass to call.

    The backend is chosen when a layer calls, since it depends on head sizes and types, and once for all that are alike;
    what it makes of the row is made once. Under autocast queries, keys and values are cast as scaled dot-product attention
    casts them.
    """

    def __init__(self, row: PackedRow, rule: Rule, backend: str = "auto"):
        self.row, self.rule, self.backend = row, rule, backend
        self._chosen: dict[Layer, str] = {}
        self._bound: dict[str, Attend] = {}

    def __call__(
        self, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """Attention output ``[B, H, S, E]``."""
        q_BHSD, k_BGSD, v_BGSE = as_autocast(q_BHSD, k_BGSD, v_BGSE)
        return self._attend(q_BHSD, k_BGSD, v_BGSE, scores)(q_BHSD, k_BGSD, v_BGSE, scores)

    def forward(
        self, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`passes.forward`; nothing is cast."""
        return passes.forward(self._attend(q_BHSD, k_BGSD, v_BGSE, scores), q_BHSD, k_BGSD, v_BGSE, scores)

    def backward(self, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores: Scores) -> passes.Gradients:
        """`passes.backward`."""
        attend = self._attend(q_BHSD, k_BGSD, v_BGSE, scores)
        return passes.backward(attend, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores)

    def _attend(self, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, scores: Scores) -> Attend:
        layer = Layer.of(q_BHSD, k_BGSD, v_BGSE, self.rule, scores)
        if layer not in self._chosen:
            self._chosen[layer] = choose_backend(self.backend, layer, self.row)
        name = self._chosen[layer]
        if name not in self._bound:
            self._bound[name] = BACKENDS[name].bind(self.row, self.rule)
        return self._bound[name]


__all__ = [
    "BACKENDS",
    "Attend",
    "Layer",
    "Rule",
    "Scores",
    "TreeAttention",
    "as_autocast",
    "check_backend",
    "choose_backend",
    "may_use_flex",
]
