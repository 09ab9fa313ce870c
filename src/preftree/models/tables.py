"""Token tables, a model's largest weights, whose gradients are added to where they lie.

A row reads and scores few of the tokens, but autograd makes passes over all of a table: the gradient of what is read begins as
zeros, is added to that of what is scored, where head and embedding are tied, and both to what earlier rows gave. Inside
`products.adding_to_gradients` the head's product adds to what there is, and what was read adds the rows that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from preftree.models import products
from preftree.models.replaced import forward_replaced


class _Read(torch.autograd.Function):
    """See `_read`."""

    @staticmethod
    def forward(ctx, ids, weight_VD, padding):
        ctx.save_for_backward(ids)
        ctx.weight_VD, ctx.padding = weight_VD, padding
        return functional.embedding(ids, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,), weight_VD = ctx.saved_tensors, ctx.weight_VD
        rows_ND, ids_N = grad.flatten(0, -2), ids.flatten()
        if (table_VD := products.so_far([weight_VD])) is None:
            table_VD = _sums(rows_ND, ids_N, len(weight_VD), ctx.padding)
        else:
            add_rows(table_VD, ids_N, rows_ND, ctx.padding)
        return None, products.placed(weight_VD, table_VD), None


class _Score(torch.autograd.Function):
    """See `_score`."""

    @staticmethod
    def forward(ctx, x, weight_VD):
        ctx.save_for_backward(x, weight_VD)
        # (A checkpoint gives what is saved as it computes it again, detached.)
        ctx.weight_VD = weight_VD
        return functional.linear(x, weight_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_VD = ctx.saved_tensors
        gradient_VD = products.weight_gradient(grad.flatten(0, -2), x.flatten(0, -2), [ctx.weight_VD])
        dx = grad @ weight_VD if ctx.needs_input_grad[0] else None
        return dx, products.placed(ctx.weight_VD, gradient_VD)


def _sums(rows_ND: torch.Tensor, ids_N: torch.Tensor, size: int, padding: int) -> torch.Tensor:
    """Rows of each id added up: ``[size, D]``. Those of ``padding`` count as zeros."""
    return torch.ops.aten.embedding_dense_backward(rows_ND, ids_N, size, padding, False)


def add_rows(table_VD: torch.Tensor, ids_N: torch.Tensor, rows_ND: torch.Tensor, padding: int = -1) -> None:
    """Add to the rows of a table that ids name, in place: once for each id, what its rows are together (in float32).

    Args:
        padding: id whose rows are not added; -1 for none.
    """
    count = len(ids_N)
    # Ids are numbered as they come in order; the device is not asked how many there are.
    ordered, order = ids_N.sort()
    number = torch.cat([ordered.new_zeros(min(count, 1)), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    number_of_N = torch.empty_like(number).scatter_(0, order, number)
    dropped = torch.where((ids_N == padding)[:, None], 0, rows_ND) if padding >= 0 else rows_ND
    # Numbers that are left over add zeros, each to another row.
    places = torch.arange(count, device=ids_N.device).remainder_(len(table_VD)).scatter_(0, number, ordered)
    sums_ND = _sums(dropped.to(torch.promote_types(dropped.dtype, torch.float32)), number_of_N, count, -1)
    table_VD.index_add_(0, places, sums_ND.to(table_VD.dtype))


def _read(table: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
    return _Read.apply(input, table.weight, -1 if table.padding_idx is None else table.padding_idx)


def _score(head: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    if input.dtype != head.weight.dtype or torch.is_autocast_enabled(input.device.type):
        return functional.linear(input, head.weight)
    return _Score.apply(input, head.weight)


def _function(table: Any) -> Callable[..., torch.Tensor] | None:
    """What computes as a module does and adds to its weight's gradient, if it is one that can."""
    if type(table) is nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq and not table.sparse:
        function: Callable[..., torch.Tensor] = _read
    elif type(table) is nn.Linear and table.bias is None:
        function = _score
    else:
        return None
    # (Others may have put a forward pass of their own on it.)
    trained = type(table.weight) is nn.Parameter and table.weight.requires_grad and "forward" not in vars(table)
    return function if trained else None


def adding_where_they_lie(table: nn.Module | None) -> AbstractContextManager[None]:
    """While inside, a model's embedding or head adds to its weight's gradient as this module's docstring says."""
    function = _function(table) if products.adding() and torch.is_grad_enabled() else None
    if table is None or function is None:
        return nullcontext()
    return forward_replaced(table, partial(function, table))
