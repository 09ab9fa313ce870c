"""What a trainer asks of the model that it is given, or of a name to load one by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, PreTrainedConfig


def check_weights(model: torch.nn.Module, name: str) -> None:
    """Raise `ValueError` naming the first parameter that holds a value which is not finite."""
    for parameter_name, parameter in model.named_parameters():
        if not all(bool(torch.isfinite(x).all()) for x in _numbers(parameter.detach())):
            raise ValueError(f"{name}: parameter {parameter_name!r} holds NaN or infinity: the weights are damaged")


def _numbers(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The floating-point numbers that a tensor is made of: of a quantised one its scales."""
    if is_traceable_wrapper_subclass(x):
        for part in (getattr(x, name) for name in x.__tensor_flatten__()[0]):
            if isinstance(part, torch.Tensor):  # (One of a DTensor's parts is its mesh.)
                yield from _numbers(part)
    elif x.is_floating_point() and not x.is_meta:
        yield x


def vocabulary_of(model: Any, args: Any) -> int:
    """Token ids that the model has an embedding for (of a model still to be loaded: by its config)."""
    if not isinstance(model, str):
        return model.get_input_embeddings().num_embeddings
    return config_of(model, args).get_text_config().vocab_size


def config_of(model: Any, args: Any) -> PreTrainedConfig:
    """A model's configuration, also of one still to be loaded."""
    if not isinstance(model, str):
        return model.config
    loading: Any = args.model_init_kwargs or {}
    named = {name: loading[name] for name in ("revision", "gguf_file", "subfolder", "token") if name in loading}
    return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **named)
