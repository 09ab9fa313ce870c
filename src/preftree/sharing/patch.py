"""`share_prefixes`: padded batches through a model's own forward pass, prefixes that rows share computed once.

The backbone's forward is replaced on the instance: a batch ``[B, L]`` becomes one row of trees, and its hidden states are
spread back to ``[B, L, hidden]``. All behind the backbone (head, loss, fused losses) is the model's own code.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from preftree.attention import check_backend
from preftree.models.interface import active_row, runs_as_stock
from preftree.models.prepare import attach_tree_attention, base_model, detach_tree_attention
from preftree.models.prepared import ATTRIBUTE, PreparedModel
from preftree.models.refusals import switched_on_since
from preftree.models.rotary import rotary_limit
from preftree.sharing.arguments import CannotShareError, check_arguments, named_arguments, scores_padding
from preftree.sharing.padded import MergedBatch, PaddedBatch, merge
from preftree.sharing.positions import StockPositions, find_stock_positions

_PATCH = "_preftree_sharing"


class _Sharing:
    """What the two patched forwards of a model (its own and its backbone's) have in common."""

    def __init__(self, base: PreTrainedModel, prepared: PreparedModel, positions: StockPositions):
        self.base = base
        self.prepared = prepared
        self.positions = positions
        self.holders = 0
        self.paused = False
        self.warned: set[str] = set()

    def warn(self, reason: str) -> None:
        if reason and reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"{type(self.base).__name__} runs without prefix sharing: {reason}", stacklevel=4)

    @torch.compiler.disable  # trees are built in Python, from values
    def backbone(self, plain: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The backbone's output for a padded batch ``[B, L]``, by its stock forward ``plain`` on a row of trees.

        Raises:
            CannotShareError: before anything has run.
            ValueError: for a token outside the vocabulary, or a mask of another shape.
        """
        check_arguments(arguments, self.base.config.get_text_config())
        if (setting := switched_on_since(self.base)) is not None:
            raise CannotShareError(f"{setting} would act differently on rows that share a prefix")
        input_ids = arguments["input_ids"]
        merged = self._merge(input_ids, arguments.get("attention_mask"), arguments.get("position_ids"))
        device = input_ids.device
        output = self.prepared.run(merged.row.to(device), position_ids=merged.position_ids.to(device), forward=plain)
        return type(output)(last_hidden_state=merged.spread(output.last_hidden_state[0]))

    def _merge(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> MergedBatch:
        batch = PaddedBatch.read(input_ids, attention_mask)
        if batch is None:
            raise CannotShareError("attention_mask has padding between a row's tokens")
        if not batch.length.any():
            raise CannotShareError("attention_mask leaves no token")
        if input_ids.device.type == "cpu":
            # (A GPU reports it by itself, as it does for the stock model.)
            batch.check_vocabulary(self.prepared.num_embeddings)
        first = self._first_positions(batch, position_ids)
        farthest = int((first + batch.length).max())
        if first.min() != first.max() and first.min() >= 0 and farthest <= self.positions.invariant_below:
            # Rows that stand at different positions share a prefix only where moving them changes nothing.
            first = torch.zeros_like(first)
        return merge(batch, first, fixed_lengths=input_ids.device.type == "cuda")

    def _first_positions(self, batch: PaddedBatch, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Where the stock model places each row's first token."""
        if position_ids is not None:
            first = batch.first_positions(position_ids)
            if first is None:
                raise CannotShareError("position_ids do not count up by one along each row's tokens")
            return first
        if not batch.start.any() or self.positions.left_padding == "mask":
            return torch.zeros_like(batch.start)
        if self.positions.left_padding == "row":
            return torch.where(batch.length > 0, batch.start, 0)
        raise CannotShareError(
            "attention_mask pads on the left, and how the stock model counts positions then is unknown"
        )


@dataclass
class _Patch:
    """A module's forward before it was patched, and who shares through the patch (None: it passes all calls on)."""

    plain: Callable[..., Any]
    own: Callable[..., Any] | None
    patched: Callable[..., Any]
    sharing: _Sharing | None


# The patched functions hold no module in a closure: a deep copy runs its own weights. They keep the stock signature.
def _sharing_backbone(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        patch: _Patch = self.__dict__[_PATCH]
        sharing = patch.sharing
        if sharing is None or sharing.paused or active_row() is not None or runs_as_stock():
            return patch.plain(*args, **kwargs)
        try:
            return sharing.backbone(patch.plain, named_arguments(stock, self, args, kwargs))
        except CannotShareError as reason:
            sharing.warn(str(reason))
        return patch.plain(*args, **kwargs)

    return forward


def _watching_labels(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        patch: _Patch = self.__dict__[_PATCH]
        sharing = patch.sharing
        if sharing is None or sharing.paused or not scores_padding(named_arguments(stock, self, args, kwargs)):
            return patch.plain(*args, **kwargs)
        sharing.warn("labels score tokens that are predicted at padding (set those labels to -100)")
        sharing.paused = True
        try:
            return patch.plain(*args, **kwargs)
        finally:
            sharing.paused = False

    return forward


def _install(module: torch.nn.Module, make: Callable[..., Any], sharing: _Sharing) -> None:
    if (patch := module.__dict__.get(_PATCH)) is not None:  # still below what others have put over it
        patch.sharing = sharing
        return
    patched = MethodType(make(type(module).forward), module)
    setattr(module, _PATCH, _Patch(module.forward, module.__dict__.get("forward"), patched, sharing))
    module.forward = patched


def _uninstall(module: torch.nn.Module) -> None:
    patch: _Patch = module.__dict__[_PATCH]
    patch.sharing = None
    if module.__dict__.get("forward") is not patch.patched:
        return  # TRL, accelerate or others have wrapped the patch since: it stays below them and passes calls on
    if patch.own is None:
        del module.forward
    else:
        module.forward = patch.own
    delattr(module, _PATCH)


class PrefixSharing:
    """A model that shares prefixes, until `undo` or the end of a ``with`` block (see `share_prefixes`)."""

    def __init__(self, sharing: _Sharing):
        self._sharing: _Sharing | None = sharing
        sharing.holders += 1

    def undo(self) -> None:
        """Give the model back as it was. Harmless when repeated; the last of several handles on a model undoes it."""
        sharing, self._sharing = self._sharing, None
        if sharing is None:
            return
        sharing.holders -= 1
        if sharing.holders:
            return
        for module in (sharing.prepared.backbone, sharing.base):
            _uninstall(module)
        if ATTRIBUTE not in sharing.base.__dict__:
            detach_tree_attention(sharing.base)

    def __enter__(self) -> PrefixSharing:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def share_prefixes(model: torch.nn.Module, backend: str = "auto") -> PrefixSharing:
    """Compute prefixes that rows of a padded batch share only once, in any training loop.

    From this call on, ``model(input_ids=..., attention_mask=..., ...)`` on a batch ``[B, L]``, padded on either side, gives
    the stock model's logits, hidden states (of its backbone) and loss, and their gradients, at all tokens; hidden states
    at padding are zero. Rows share a prefix of any length from their first token on. ``past_key_values`` are None.

    Calls that cannot be shared exactly run as in the stock model. Generation (``past_key_values``, ``use_cache=True``)
    does so in silence, others with a warning, once for each reason: ``inputs_embeds``, masks that are not ``[B, L]``,
    padding between tokens, positions that do not count up by one, labels that are predicted at padding, attentions,
    hidden states of all layers or router logits as outputs, dropout in training, arguments that are not known here.

    Args:
        model: a transformers causal language model, or a PEFT model around one; it is changed in place. PEFT, DDP and
            accelerate may wrap it later; fused losses of TRL and Liger may be put into it before or after.
        backend: the attention backend, as for `preftree.prepare_model`.

    Returns:
        A handle: ``handle.undo()`` gives the stock model back, as does the end of ``with share_prefixes(model):``. A model
        that was prepared before stays prepared. A model can be shared several times over, until the last handle is
        undone. A deep copy shares with its own weights, and copies of the handles in the same `copy.deepcopy` undo it.

    Raises:
        NotImplementedError: if the model cannot share prefixes exactly, naming family, setting and reason.
        TypeError: for anything but a transformers or PEFT model.
        ValueError: for an unknown backend, another one than the model shares with already, or weights that give no finite
            hidden states. Later, from the forward pass: for a mask of another shape than ``input_ids``, or (on a CPU) a
            token outside the vocabulary.
    """
    base = base_model(model)
    check_backend(backend, base.device)
    patch = base.__dict__.get(_PATCH)
    if patch is not None and (sharing := patch.sharing) is not None:
        if backend not in ("auto", sharing.prepared.backend):
            raise ValueError(
                f"the model shares prefixes with backend {sharing.prepared.backend!r} already: undo that before asking "
                f"for {backend!r}"
            )
        return PrefixSharing(sharing)
    if (limit := rotary_limit(base.config)) is not None:
        raise NotImplementedError(
            f"{type(base).__name__} (model_type {base.config.model_type!r}) cannot share prefixes of padded batches exactly: "
            f"rope_type={limit.rope_type!r}: its frequencies depend on the longest row of a batch"
        )
    prepared = attach_tree_attention(base, backend)
    try:
        positions = find_stock_positions(prepared)
    except Exception:
        if ATTRIBUTE not in base.__dict__:
            detach_tree_attention(base)
        raise
    sharing = _Sharing(base, prepared, positions)
    _install(prepared.backbone, _sharing_backbone, sharing)
    _install(base, _watching_labels, sharing)
    return PrefixSharing(sharing)
