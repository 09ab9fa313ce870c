"""A reference that FSDP2 shares out layer by layer, with the first rank's weights.

TRL has FSDP2 share out the reference as one piece, which every rank gathers as a whole before each forward pass; and where one
rank loads weights for all (`cpu_ram_efficient_loading`), nobody hands on the reference's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.fsdp_utils import get_parameters_from_modules
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from preftree.models import prepared_part


@contextlib.contextmanager
def sharded_by_layers(trainer: type, changes: bool) -> Iterator[None]:
    """While inside, TRL's constructor of a trainer shares its reference out as `_shard` does.

    Args:
        trainer: a class with one of TRL's among its bases.
        changes: the reference follows the policy: weights that stayed whole behind a forward pass would be old ones.
    """
    module = sys.modules[next(base.__module__ for base in trainer.__mro__ if base.__module__.startswith("trl."))]
    name = "prepare_fsdp"
    stock = getattr(module, name)

    def prepare(model: torch.nn.Module, accelerator: Any) -> torch.nn.Module:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or isinstance(model, FSDPModule):
            return stock(model, accelerator)
        _shard(model, accelerator, plugin)
        model = stock(model, accelerator)  # what is left of it
        if changes and isinstance(model, FSDPModule):
            model.set_reshard_after_forward(True)
        return model

    setattr(module, name, prepare)
    try:
        yield
    finally:
        setattr(module, name, stock)


def _shard(model: torch.nn.Module, accelerator: Any, plugin: Any) -> None:
    """Share out a model's decoder layers, each by itself."""
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
        "ignored_params": get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device),
    }
    prepared = prepared_part(model)
    layers = list(prepared.layers or ()) if prepared is not None else []
    weights = [weight for layer in layers for weight in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights):  # which layers share: these stay together
        layers = []
    for part in (*layers, model):
        if plugin.cpu_ram_efficient_loading:
            _take_from_the_first(part, accelerator.device)
        if part is not model:
            fully_shard(part, **options)


def _take_from_the_first(part: torch.nn.Module, device: torch.device) -> None:
    """Put the first rank's weights and buffers in the place of a part's that have not been shared out yet."""
    for name, own in (*part.named_parameters(), *part.named_buffers()):
        if isinstance(own, DTensor):
            continue
        if own.is_meta:
            raise NotImplementedError(
                f"the reference's {name} is nowhere on rank {distributed.get_rank()}: set cpu_ram_efficient_loading to false"
            )
        value = own.data.to(device)
        distributed.broadcast(value, src=0)
        own.data = value
