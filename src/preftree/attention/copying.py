"""Keys and values to the paths of a plan, and their gradients back: slices in torch, or one Triton kernel each way."""

from __future__ import annotations

import torch

from preftree.attention.fa4 import TiledSums
from preftree.attention.paths import TILE, PathPlan
from preftree.kernels import kernels_for, kernels_of

_KERNELS = "preftree.attention.copying_triton"


def copy_to_paths(k_SGD: torch.Tensor, v_SGE: torch.Tensor, plan: PathPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the row, ``[S, G, ...]``, to those of all blocks, ``[K, G, ...]``; differentiable."""
    return _copy(k_SGD, v_SGE, plan.copies, plan.sources, plan.origins, plan.num_keys, plan.num_tokens)


@torch.library.custom_op("preftree::copy_to_paths", mutates_args=())
def _copy(
    k_SGD: torch.Tensor,
    v_SGE: torch.Tensor,
    copies: torch.Tensor,
    sources: torch.Tensor,
    origins: torch.Tensor,
    num_keys: int,
    num_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = kernels_for(k_SGD, _KERNELS)
    copied = []
    for x in (k_SGD, v_SGE):
        y = x.new_empty((num_keys, *x.shape[1:]))
        if kernels is not None:
            kernels.copy(x, y, copies, TILE)
        else:
            for start, to, length in copies.tolist():
                y[to : to + length] = x[start : start + length]
        copied.append(y)
    return copied[0], copied[1]


@_copy.register_fake
def _(k_SGD, v_SGE, copies, sources, origins, num_keys, num_tokens):
    return k_SGD.new_empty((num_keys, *k_SGD.shape[1:])), v_SGE.new_empty((num_keys, *v_SGE.shape[1:]))


@torch.library.custom_op("preftree::sum_from_paths", mutates_args=())
def _sum(
    dk_KGD: torch.Tensor,
    dv_KGE: torch.Tensor,
    sources: torch.Tensor,
    origins: torch.Tensor,
    num_tokens: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums in float32 at least, rounded once, always in the same order; zeros at the row's padding."""
    dk_SGD, dv_SGE = (sum_pieces(x, sources, origins, num_tokens, length) for x in (dk_KGD, dv_KGE))
    return dk_SGD, dv_SGE


def sum_pieces(
    x: torch.Tensor, sources: torch.Tensor, origins: torch.Tensor, num_tokens: int, length: int
) -> torch.Tensor:
    """``[K, G, D]`` to ``[length, G, D]``: to each of the row's tokens the sum of its copies."""
    kernels = kernels_for(x, _KERNELS)
    y = x.new_empty((length, *x.shape[1:]))
    y[num_tokens:] = 0
    if kernels is not None:
        kernels.sum_up(x.contiguous(), y, sources, origins, TILE)
        return y
    offsets = [offset for offset, _ in origins.tolist()]
    for node, count, first, last in sources.tolist():
        terms = [x[node + offset : node + offset + count] for offset in offsets[first:last]]
        y[node : node + count] = torch.stack(terms).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return y


def sum_tiles(
    tiled: TiledSums,
    like: torch.Tensor,
    key_starts: torch.Tensor,
    sources: torch.Tensor,
    origins: torch.Tensor,
    num_tokens: int,
    length: int,
) -> torch.Tensor:
    """Like `sum_pieces`, from a kernel's float32 sums over copies shaped and typed as ``like`` ``[K, G, D]``."""
    y = like.new_empty((length, *like.shape[1:]))
    y[num_tokens:] = 0
    kernels_of(_KERNELS).sum_up_tiles(tiled, y, sources, origins, key_starts, TILE)
    return y


@_sum.register_fake
def _(dk_KGD, dv_KGE, sources, origins, num_tokens, length):
    return dk_KGD.new_empty((length, *dk_KGD.shape[1:])), dv_KGE.new_empty((length, *dv_KGE.shape[1:]))


def _save(ctx, inputs, output):
    k_SGD, _, _, sources, origins, _, num_tokens = inputs
    ctx.save_for_backward(sources, origins)
    ctx.lengths = num_tokens, k_SGD.shape[0]


def _differentiate(ctx, dk_KGD, dv_KGE):
    sources, origins = ctx.saved_tensors
    return *_sum(dk_KGD, dv_KGE, sources, origins, *ctx.lengths), None, None, None, None, None


_copy.register_autograd(_differentiate, setup_context=_save)
