"""Which calls of a model can be computed from a row of trees: what their arguments ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# What the head and its loss read, passed through the backbone.
_FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")
# Each would come out in the row's shape.
_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class CannotShareError(Exception):
    """A call that the stock forward must serve; the message says why, and is empty for generation, which is expected."""


def check_arguments(arguments: dict[str, Any], config: Any) -> None:
    """Raise `CannotShareError` for whatever the row could not do, `ValueError` for a mask that does not fit."""
    given = {name: value for name, value in arguments.items() if value is not None and name not in _FOR_THE_LOSS}
    if "past_key_values" in given or given.pop("use_cache", False):
        raise CannotShareError
    for name in _EXTRA_OUTPUTS:
        if given.pop(name, getattr(config, name, False)):
            raise CannotShareError(f"{name} asks for values in the shape of the whole batch")
    if given.pop("return_dict", True) is not True or not getattr(config, "return_dict", True):
        raise CannotShareError("return_dict=False")
    if given.pop("is_causal", True) is not True:
        raise CannotShareError("is_causal=False")
    for name in sorted(given.keys() - {"input_ids", "attention_mask", "position_ids"}):
        raise CannotShareError(f"its argument {name} cannot be laid out in a row of trees")
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        raise CannotShareError("input_ids are no batch [B, L] of tokens")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        raise CannotShareError("attention_mask is no mask [B, L] of padding")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, input_ids have {list(input_ids.shape)}: they must be the same"
        )


def named_arguments(function: Callable[..., Any], module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name. Whatever does not fit is left for the function itself to reject."""
    signature = inspect.signature(function)
    try:
        arguments = dict(signature.bind_partial(module, *args, **kwargs).arguments)
    except TypeError:
        return {}
    arguments.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def scores_padding(arguments: dict[str, Any]) -> bool:
    """Whether a label's prediction stands at padding, where the stock model has numbers and a row of trees has none."""
    mask_BL = arguments.get("attention_mask")
    if not isinstance(mask_BL, torch.Tensor) or mask_BL.ndim != 2:
        return False
    for name, ahead in (("labels", 1), ("shift_labels", 0)):
        labels_BL = arguments.get(name)
        if isinstance(labels_BL, torch.Tensor) and labels_BL.shape == mask_BL.shape:
            padding = mask_BL[:, : mask_BL.shape[1] - ahead] == 0
            if bool(((labels_BL[:, ahead:] != -100).to(padding.device) & padding).any()):
                return True
    return False
