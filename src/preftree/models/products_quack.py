"""The products of `products_formulas` by QuACK's kernels for Hopper (the package quack-kernels)."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import torch
import torch.distributed as dist
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_dgated, gemm_gated, gemm_tuned

_NEEDED = {
    gemm_gated: ("config", "concat_layout", "preact_out", "store_preact"),
    gemm_dgated: ("config", "dynamic_scheduler"),
    gemm_tuned.fn: ("C", "config", "concat_layout"),
}
for _function, _names in _NEEDED.items():
    if _missing := [name for name in _names if name not in inspect.signature(_function).parameters]:
        raise ImportError(f"this quack-kernels lacks {', '.join(_missing)}: preftree needs 0.6.5 or later")


def refusal(capability: tuple[int, ...]) -> str | None:
    """Why the kernels do not serve devices of a compute capability, or None."""
    if capability[0] != 9:
        return f"their tiles are chosen for compute capability 9.x, this device has {'.'.join(map(str, capability))}"
    return None


def _tile(m: int, n: int, cluster: tuple[int, int], pingpong: bool = False) -> GemmConfig:
    return GemmConfig(
        tile_m=m, tile_n=n, pingpong=pingpong, cluster_m=cluster[0], cluster_n=cluster[1], is_dynamic_persistent=False
    )


# The fastest on an H100 at its limit of power, for 8,192 tokens of 2,048 features and 6,144 in between.
_UP = _tile(128, 160, (2, 1), pingpong=True)
_UP_BACKWARD = _tile(128, 160, (2, 1), pingpong=True)
_INPUT_GRADIENT = _tile(256, 128, (1, 2))
_WEIGHT_GRADIENTS = _tile(128, 256, (2, 1))
_ONTO = _tile(128, 256, (2, 1))


def _scheduled(config: GemmConfig) -> GemmConfig:
    """How a kernel's tiles come to the multiprocessors: by turns, or to the next that is free where several processes train.

    By turns, nothing has to be counted. But exchanges between devices, which go on beside the products, hold some of them: the
    tiles whose turn is theirs would wait until these are free again.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _to_the_next_free(config) if several else config


@functools.cache
def _to_the_next_free(config: GemmConfig) -> GemmConfig:
    return replace(config, is_dynamic_persistent=True)


def up(
    x_ND: torch.Tensor, weights_F2D: torch.Tensor, activation: str, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `products_formulas.up`."""
    both_NF2, out_NF = gemm_gated(
        x_ND,
        weights_F2D.T,
        activation=activation,
        store_preact=keeps,
        config=_scheduled(_UP),
        concat_layout=("B",),
    )
    return out_NF, both_NF2 if keeps else x_ND.new_empty(0)


def up_backward(
    grad_ND: torch.Tensor, down_DF: torch.Tensor, both_NF2: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `products_formulas.up_backward`."""
    return gemm_dgated(
        grad_ND, down_DF, both_NF2, activation=activation, dynamic_scheduler=False, config=_scheduled(_UP_BACKWARD)
    )


def input_gradient(grads_NF2: torch.Tensor, weights_F2D: torch.Tensor) -> torch.Tensor:
    """See `products_formulas.input_gradient`."""
    out_ND = grads_NF2.new_empty(grads_NF2.shape[0], weights_F2D.shape[1])
    gemm_tuned.fn(grads_NF2, weights_F2D, out_ND, config=_scheduled(_INPUT_GRADIENT), concat_layout=("B",))
    return out_ND


def weight_gradients(
    grads_NF2: torch.Tensor, x_ND: torch.Tensor, so_far_F2D: torch.Tensor | None = None
) -> torch.Tensor:
    """See `products_formulas.weight_gradients`."""
    out_F2D = grads_NF2.new_empty(grads_NF2.shape[1], x_ND.shape[1]) if so_far_F2D is None else so_far_F2D
    apart = ("out",) if so_far_F2D is None else ("C", "out")
    gemm_tuned.fn(grads_NF2.T, x_ND, out_F2D, C=so_far_F2D, config=_scheduled(_WEIGHT_GRADIENTS), concat_layout=apart)
    return out_F2D


def onto(x_ND: torch.Tensor, weight_ED: torch.Tensor, residual_NE: torch.Tensor) -> torch.Tensor:
    """See `products_formulas.onto`."""
    out_NE = torch.empty_like(residual_NE)
    gemm_tuned.fn(x_ND, weight_ED.T, out_NE, C=residual_NE, config=_scheduled(_ONTO))
    return out_NE
