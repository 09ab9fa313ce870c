"""The attention and mask functions that preftree registers with transformers.

A family's forward pass asks the registered mask function for its mask (once per kind of layer) and hands what it gets
to the registered attention function in every layer. While a row is active the mask function answers with a `RowMask`,
which carries the row's attention; outside, and for any other mask, both do what the model did before. Because the
layer receives the row inside its mask, a layer that activation checkpointing runs again finds the same row.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from preftree.attention import Rule, Scores, TreeAttention, as_autocast, may_use_flex
from preftree.attention.passes import Gradients
from preftree.models import operator
from preftree.models.replaced import hooked
from preftree.packing import PackedRow

# The name says which function serves ordinary batches. Names that contain "flash", "sdpa" or "flex_attention" would
# make transformers treat them specially.
OVER_SDPA = "preftree"
OVER_EAGER = "preftree_eager"
_STOCK_NAMES = {OVER_SDPA: "sdpa", OVER_EAGER: "eager"}

# Arguments that change what a layer attends to beyond its mask; families that pass them are refused.
_UNSUPPORTED_ARGUMENTS = ("indices", "topk_indices", "block_indices", "head_mask")


@dataclass
class ActiveRow:
    """The row of the forward pass that is running, and how many layers have attended to it.

    Attributes:
        contiguous: hand contiguous tensors to attention: TRL's activation offloading gives back what it stored as such,
            which a compiled kernel's backward pass does not expect of others.
        wanted: LongTensor ``[N]``, the only tokens that the last layer need be computed at (see `last_layer`), or None.
        cut: the last layer was computed at these alone.
        attention_calls: of layers, through the row's attention.
        path_calls: of parts of layers that run along the row's paths (see `mixers`).
        paths_together: all of these in one batch, not in several of about one length.
        masks: those that were made for layers of this forward pass, while it runs.
    """

    row: PackedRow
    backend: str
    contiguous: bool = False
    wanted: torch.Tensor | None = None
    cut: bool = False
    attention_calls: int = 0
    path_calls: int = 0
    paths_together: bool = False
    masks: list[RowMask] = field(default_factory=list)


_active_row: ContextVar[ActiveRow | None] = ContextVar("preftree_active_row", default=None)


@contextmanager
def activate(
    row: PackedRow, backend: str, contiguous: bool = False, wanted: torch.Tensor | None = None
) -> Iterator[ActiveRow]:
    """Masks that are made inside belong to ``row``."""
    active = ActiveRow(row, backend, contiguous, wanted)
    try:
        with resumed(active):
            yield active
    finally:
        active.masks = []  # each holds the row


def active_row() -> ActiveRow | None:
    """The row of the forward pass that is running, or None for an ordinary one."""
    return _active_row.get()


@contextmanager
def resumed(active: ActiveRow | None) -> Iterator[None]:
    """While inside, the forward pass is that of a row again, or of none."""
    token = _active_row.set(active)
    try:
        yield
    finally:
        _active_row.reset(token)


_stock: ContextVar[bool] = ContextVar("preftree_stock", default=False)


def runs_as_stock() -> bool:
    """Whether what runs is to be the stock model, whatever shares through it."""
    return _stock.get()


@contextmanager
def as_stock(config: PreTrainedConfig | None) -> Iterator[None]:
    """While inside, a model with this configuration is the stock model, by the name of its attention too.

    Some families' code does more by itself where that name is one of those they know.
    """
    name: Any = getattr(config, "_attn_implementation", None)
    ours: Any = config if name in _STOCK_NAMES else None  # of others it is theirs, and their parts' own
    token = _stock.set(True)
    if ours is not None:
        ours._attn_implementation = _STOCK_NAMES[name]
    try:
        yield
    finally:
        _stock.reset(token)
        if ours is not None:
            ours._attn_implementation = name


def no_row() -> AbstractContextManager[None]:
    """While inside, the forward pass is an ordinary one: of a part of a layer, on sequences."""
    return resumed(None)


def outside_of_rows(modules: Iterable[torch.nn.Module]) -> AbstractContextManager[None]:
    """While inside, forward passes of these modules are ordinary ones: what they compute (images) is no row."""
    left: list[Any] = []

    def leave(module: torch.nn.Module, args: tuple) -> None:
        left.append(_active_row.set(None))

    def come_back(module: torch.nn.Module, args: tuple, output: Any) -> None:
        _active_row.reset(left.pop())

    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(leave))
        handles.append(module.register_forward_hook(come_back, always_call=True))
    return hooked(handles)


class KeysReached(Exception):  # noqa: N818
    """A layer's keys and values: nothing behind them is needed."""


class RowMask:
    """What layers receive in place of a mask tensor. (No dataclass: FSDP looks for tensors in the fields of these.)

    Attributes:
        active: the row.
        attend: attention bound to the row and the family's rule.
        nodes: the tokens that the layer is computed at, if not all of the row's.
        keys: keys and values of all tokens, for such a layer to attend to in place of its own.
        wants_keys: attention is not to be computed, its keys and values are thrown as `KeysReached`.
        stock: what makes the stock model's mask in this one's place, given a batch's sizes.
        handle: for compiled layers, the mask's number (see `operator`); None where attention has to stay outside.
        by_length: what ``stock`` made, for the other layers.
        at_wanted: the same at `ActiveRow.wanted` alone, from when a layer first asked for it.
    """

    def __init__(
        self,
        active: ActiveRow,
        attend: Any,
        nodes: torch.Tensor | None = None,
        stock: Callable[..., torch.Tensor | None] | None = None,
    ):
        self.active = active
        self.attend = attend
        self.nodes = nodes
        self.keys: tuple[torch.Tensor, torch.Tensor] | None = None
        self.wants_keys = False
        self.stock = stock
        self.handle: torch.Tensor | None = None
        self.at_wanted: RowMask | None = None
        self.by_length: dict[int, torch.Tensor | None] = {}
        active.masks.append(self)
        # (What knows tokens is FlexAttention's where there is a GPU.)
        if not self._knows_tokens and not may_use_flex(self.active.backend, self.active.row.device):
            self.handle = operator.register(self, self.active.row.device)

    @property
    def _knows_tokens(self) -> bool:
        return self.attend.rule.nodes is not None

    def for_sequences(self, count: int, length: int) -> torch.Tensor | None:
        """The mask that the stock model makes for sequences ``[count, length]`` (None where it makes none)."""
        if length not in self.by_length:
            if self._knows_tokens:
                raise NotImplementedError("its mask knows of a row's tokens (an image's), which a path's are not")
            # One for all: a family's rule may know of each sequence of the batch that it was made for, here one row.
            sizes = {"batch_size": 1, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
            made = None if self.stock is None else self.stock(**(sizes | {"attention_mask": None}))
            self.by_length[length] = made
        mask = self.by_length[length]
        return mask if mask is None else mask.expand(count, *mask.shape[1:])

    def but(self, **changes: Any) -> RowMask:
        """A copy under the same number, which lasts as long as this mask does."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def __call__(self, layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores):
        """Attention output ``[B, H, N, E]`` for the queries, keys and values of a layer, which is named in errors."""
        self._check(layer, query, key)
        if self.active.contiguous:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out_BHNE = self.attend(query, key, value, scores)
        self.active.attention_calls += 1
        return out_BHNE

    def forward(
        self, layer: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output as by a call, not differentiable, and what `backward` wants (see `attention.passes`)."""
        self._check(layer, query, key)
        output = self.attend.forward(query, key, value, scores)
        self.active.attention_calls += 1
        return output

    def backward(self, grad, query, key, value, out, lse, scores: Scores) -> Gradients:
        """Gradients of queries, keys, values, sinks and bias."""
        return self.attend.backward(grad, query, key, value, out, lse, scores)

    def _check(self, layer: str, query: torch.Tensor, key: torch.Tensor) -> None:
        length = len(self.active.row)
        tokens = length if self.nodes is None else len(self.nodes)
        if query.shape[2] != tokens or key.shape[2] != length:
            raise NotImplementedError(
                f"{layer} attends from {query.shape[2]} queries to {key.shape[2]} keys in a row of {length}: it does not "
                "attend token by token"
            )


def _rule(mask_function: Callable[..., Any], local_size: int | None, row: PackedRow | None = None) -> Rule:
    """What a family's mask function for a row hides, as far as it is one that transformers makes.

    Those are told by their code, and their size by what it closes over; left padding, which moves chunks, is none in a row.
    """
    if mask_function is causal_mask_function:
        return Rule(mask_function, causal=True)
    parts = _closed_over(mask_function, _SOME_WINDOW).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        window = _closed_over(parts[0], sliding_window_overlay(1)).get("sliding_window")
        chunk = _closed_over(parts[0], chunked_overlay(1, torch.zeros(1))).get("chunk_size")
        if window is not None or chunk is not None:
            return Rule(mask_function, window=window, chunk=chunk, reach=local_size)
    if row is not None and _knows_tokens(mask_function, len(row)):
        return Rule(mask_function, reach=local_size, nodes=_over_nodes(mask_function, row))
    return Rule(mask_function, reach=local_size)


def _parts(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Callable[..., Any], ...]] | None:
    """What a mask function has been combined by, and of which others; None of one that has not."""
    for combine in (and_masks, or_masks):
        if parts := _closed_over(mask_function, combine()).get("mask_functions"):
            return combine, parts
    return None


def _knows_tokens(mask_function: Callable[..., Any], length: int) -> bool:
    """Whether it, or a part of it, holds something for each of a row's tokens, which it looks up by index."""
    if (combined := _parts(mask_function)) is not None:
        return any(_knows_tokens(part, length) for part in combined[1])
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    return any(isinstance(each, torch.Tensor) and each.ndim == 2 and each.shape[1] == length for each in held)


def _over_nodes(mask_function: Callable[..., Any], row: PackedRow) -> Callable[..., Any]:
    """The same asked about a row's nodes: parts that hold something for each token as they are, others about positions."""
    if (combined := _parts(mask_function)) is not None:
        combine, parts = combined
        return combine(*(_over_nodes(part, row) for part in parts))
    if _knows_tokens(mask_function, len(row)):
        return mask_function
    positions = row.position_ids
    return lambda batch, head, query, key: mask_function(batch, head, positions[query], positions[key])


def _closed_over(function: Callable, like: Callable) -> dict[str, Any]:
    """What a function closes over, by name, if its code is that of ``like``."""
    if getattr(function, "__code__", None) is not like.__code__ or function.__closure__ is None:
        return {}
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__), strict=True))


_SOME_WINDOW = sliding_window_causal_mask_function(1)


def _tree_mask(fallback):
    def mask(*args, mask_function=causal_mask_function, local_size=None, **kwargs):
        active = _active_row.get()
        if active is None:
            return fallback(*args, mask_function=mask_function, local_size=local_size, **kwargs)
        attend = TreeAttention(active.row, _rule(mask_function, local_size, active.row), active.backend)
        stock = functools.partial(fallback, *args, mask_function=mask_function, local_size=local_size, **kwargs)
        return RowMask(active, attend, stock=stock)

    return mask


def _family_module(layer: torch.nn.Module, name: str) -> ModuleType | None:
    """The module that defines the layer's class (or a class it derives from) and has ``name``."""
    for parent in type(layer).__mro__:
        module = sys.modules.get(parent.__module__)
        if module is not None and hasattr(module, name):
            return module
    return None


def _stock_attention(layer: torch.nn.Module, eager: bool):
    """What the layer would call without preftree: the family's eager function, or its entry for "sdpa"."""
    if eager:
        module = _family_module(layer, "eager_attention_forward")
        if module is None:
            raise NotImplementedError(f"{type(layer).__name__} has no eager attention function to fall back on")
        return module.eager_attention_forward
    module = _family_module(layer, "ALL_ATTENTION_FUNCTIONS")
    return (module.ALL_ATTENTION_FUNCTIONS if module else ALL_ATTENTION_FUNCTIONS)["sdpa"]


# For compiled layers that attend through FlexAttention: a compiled kernel itself, for this row's length.
_attend_outside = torch.compiler.disable(RowMask.__call__)


def _tree_attention(eager: bool):
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: RowMask | torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(attention_mask, RowMask):
            if _active_row.get() is not None:
                raise NotImplementedError(f"{type(module).__name__} makes its attention mask by itself")
            optional = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
            kwargs.update({name: given for name, given in optional.items() if given is not None})
            stock = _stock_attention(module, eager)
            return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        if dropout:
            raise NotImplementedError(
                f"{type(module).__name__} asks for attention dropout {dropout}: a shared prefix would get one dropout "
                "mask where separate sequences get several. Set the model's attention dropout to 0"
            )
        for name in _UNSUPPORTED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{type(module).__name__} selects keys by index ({name})")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if attention_mask.wants_keys:
            raise KeysReached(key, value)
        if attention_mask.keys is not None:
            key, value = attention_mask.keys
        name = type(module).__name__
        if torch.compiler.is_compiling() and attention_mask.handle is not None:
            query, key, value = as_autocast(query, key, value)
            handle = attention_mask.handle
            out_BHNE = operator.row_attention(query, key, value, s_aux, position_bias, handle, scale, softcap, name)
        else:
            attend = _attend_outside if torch.compiler.is_compiling() else RowMask.__call__
            scores = Scores(scale, softcap, s_aux, position_bias)
            out_BHNE = attend(attention_mask, name, query, key, value, scores)
        return out_BHNE.transpose(1, 2).contiguous(), None

    return attention


for _name, _eager, _mask in ((OVER_SDPA, False, sdpa_mask), (OVER_EAGER, True, eager_mask)):
    AttentionInterface.register(_name, _tree_attention(_eager))
    AttentionMaskInterface.register(_name, _tree_mask(_mask))
