"""A layer's products that compute what stands behind them as well, forward and backward, where such kernels serve.

A compiler leaves products to a library and makes passes over memory of what stands between them: of a gated MLP's activation
and of the sums with the residual stream. A kernel that has its results in registers needs no pass, and rounds less often
(`products_quack`). A gated MLP (Shazeer, arXiv 2002.05202, equation 6) keeps gate and up for the backward pass with their
columns in turns, ``[g0, u0, g1, u1, ...]``, which is how the kernels have them side by side.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from preftree.kernels import kernels_for, kernels_of, relative_errors, works
from preftree.models import products_formulas
from preftree.models.custom_ops import composite, fake, opaque

# By their names as gated units.
ACTIVATIONS = ("swiglu", "geglu")
_KERNELS = "preftree.models.products_quack"


def serves(*operands: torch.Tensor) -> bool:
    """Whether kernels compute products of these operands, an input and weights; fake tensors will do."""
    x = operands[0]
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if any(each.device != x.device or each.dtype != x.dtype or each.shape[-1] % 8 for each in operands):
        return False
    return all(each.ndim == 2 and each.shape[0] % 8 == 0 for each in operands[1:]) and _work(x.device, x.dtype)


@functools.cache
def _work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels are there for a device and compute what the formulas do, tried once on a few numbers."""
    kernels = kernels_of(_KERNELS)
    if kernels is None or kernels.refusal(torch.cuda.get_device_capability(device)) is not None:
        return False
    with unset_fake_temporarily(), torch.no_grad(), torch.cuda.device_of(torch.empty(0, device=device)):
        generator = torch.Generator(device).manual_seed(0)
        shapes = (40, 64), (192, 64), (64, 96), (40, 64)
        x, weights, down, grad = (torch.randn(s, device=device, generator=generator).div(8).to(dtype) for s in shapes)
        _, both = products_formulas.up(x, weights, "swiglu", True)

        def all_of(products: Any) -> tuple[torch.Tensor, ...]:
            return (
                *products.up(x, weights, "swiglu", True),
                products.up(x, weights, "swiglu", False)[0],
                *products.up_backward(grad, down, both, "swiglu"),
                products.input_gradient(both, weights),
                products.weight_gradients(both, x),
                products.weight_gradients(both, x, weights.clone()),
                products.onto(x, weights, both),
            )

        return works(
            lambda: relative_errors(all_of(kernels), all_of(products_formulas)),
            "the kernels of the package quack-kernels do not work here, layers run somewhat slower without them",
        )


def side_by_side(model: nn.Module) -> int:
    """Let weights that kernels serve lie behind each other in memory where they may read one input; returns how many do.

    That is where layers of one module that follow each other, without biases, take inputs of one size. They can be read as
    one matrix then, which else would be put together anew for each product. Parameters stay what they are, with other memory
    behind them: optimizers, checkpoints and tied weights see no difference.
    """
    found = 0
    for module in model.modules():
        linears: list[Any] = [layer for layer in module.children() if isinstance(layer, nn.Linear)]
        for (size, *_), group in groupby(linears, key=_joins):
            weights = [layer.weight for layer in group]
            distinct = len(set(map(id, weights))) == len(weights)
            if size is not None and len(weights) > 1 and distinct and serves(weights[0], *weights):
                together = torch.cat([weight.data for weight in weights])
                for weight, part in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
                    weight.data = part
                found += len(weights)
    return found


def _joins(linear: Any) -> tuple[Any, ...]:
    """What layers have in common whose weights may lie behind each other; None first and itself for one that may not."""
    weight = linear.weight
    if type(linear) is not nn.Linear or linear.bias is not None or not _alone(weight):
        return None, id(linear)
    return weight.shape[-1], weight.dtype, weight.device


def _alone(weight: Any) -> bool:
    """Whether a parameter is all that its memory holds: not a part of what somebody has laid out."""
    return (
        type(weight) is nn.Parameter
        and weight.is_contiguous()
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    )


def _as_one(*weights: torch.Tensor) -> torch.Tensor:
    """Weights ``[E, D]`` as one matrix: without a copy where they lie behind each other."""
    together = _behind_each_other(weights)
    return torch.cat(weights) if together is None else together


def _behind_each_other(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Matrices ``[E, D]`` that lie behind each other in one piece of memory, as the one that they are; or None."""
    first = matrices[0]
    start = behind = first.data_ptr()
    for matrix in matrices:
        if matrix.data_ptr() != behind or not matrix.is_contiguous():
            return None
        behind += matrix.nbytes
    # Others' memory may lie behind the first one's by chance.
    memory = first.untyped_storage()
    if behind > memory.data_ptr() + memory.nbytes():
        return None
    size = first.shape[1]
    return first.as_strided(((behind - start) // (size * first.element_size()), size), (size, 1))


_adding = False


def adding() -> bool:
    """Whether `adding_to_gradients` is on."""
    return _adding


@contextlib.contextmanager
def adding_to_gradients(on: bool) -> Iterator[None]:
    """While inside (if ``on``), backward passes add to the gradients that weights have already within the products.

    The sum is rounded once then, and needs no pass over memory of its own. For backward passes that accumulate in ``.grad``
    alone: not for `torch.autograd.grad`, nor where somebody else keeps or exchanges gradients, as between processes.
    """
    global _adding
    before, _adding = _adding, on
    try:
        yield
    finally:
        _adding = before


def so_far(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Gradients that weights have, as one matrix, which is taken from them: to be added to and given as their gradient.

    None where there is nothing to add to, or somebody watches what is added (hooks).
    """
    if not _adding:
        return None
    if not all(_trained(weight) and not weight._backward_hooks for weight in weights):
        return None
    gradients = [weight.grad for weight in weights if type(weight.grad) is torch.Tensor]
    if len(gradients) < len(weights) or any(
        gradient.dtype != weight.dtype or gradient.layout != torch.strided
        for gradient, weight in zip(gradients, weights, strict=True)
    ):
        return None
    together = _behind_each_other(gradients)
    if together is not None:
        for weight in weights:
            weight.grad = None
    return together


def placed(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Make a gradient a weight's first, ahead of what autograd would do at the end: None then, else the gradient as it is."""
    if not _adding or weight.grad is not None or not _trained(weight) or _watched(weight):
        return gradient
    weight.grad = gradient
    return None


def _trained(weight: torch.Tensor) -> bool:
    return weight.is_leaf and weight.requires_grad


def _watched(weight: Any) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def _by(x: torch.Tensor) -> Any:
    """The kernels, or what they are to compute."""
    return kernels_for(x, _KERNELS) or products_formulas


@opaque("gated_up(Tensor x, Tensor gate, Tensor up, str activation, bool keeps) -> (Tensor, Tensor)")
def _up(x_ND, gate_FD, up_FD, activation, keeps):
    return _by(x_ND).up(x_ND.contiguous(), _as_one(gate_FD, up_FD), activation, keeps)


@fake(_up)
def _(x_ND, gate_FD, up_FD, activation, keeps):
    shape = (x_ND.shape[0], gate_FD.shape[0])
    return x_ND.new_empty(shape), x_ND.new_empty((shape[0], 2 * shape[1]) if keeps else 0)


@opaque("gated_up_backward(Tensor grad, Tensor down, Tensor both, str activation) -> (Tensor, Tensor)")
def _up_backward(grad_ND, down_DF, both_NF2, activation):
    return _by(grad_ND).up_backward(grad_ND.contiguous(), down_DF.contiguous(), both_NF2, activation)


@fake(_up_backward)
def _(grad_ND, down_DF, both_NF2, activation):
    return torch.empty_like(both_NF2), grad_ND.new_empty((grad_ND.shape[0], down_DF.shape[1]))


@opaque("gated_input_gradient(Tensor grads, Tensor gate, Tensor up) -> Tensor")
def _input_gradient(grads_NF2, gate_FD, up_FD):
    return _by(grads_NF2).input_gradient(grads_NF2, _as_one(gate_FD, up_FD))


@fake(_input_gradient)
def _(grads_NF2, gate_FD, up_FD):
    return grads_NF2.new_empty((grads_NF2.shape[0], gate_FD.shape[1]))


@opaque("gated_weight_gradients(Tensor grads, Tensor x, Tensor[] weights) -> Tensor")
def _weight_gradients(grads_NF2, x_ND, weights):
    return _by(grads_NF2).weight_gradients(grads_NF2, x_ND.contiguous(), so_far(weights))


@fake(_weight_gradients)
def _(grads_NF2, x_ND, weights):
    return grads_NF2.new_empty((grads_NF2.shape[1], x_ND.shape[1]))


@opaque("product_onto(Tensor x, Tensor weight, Tensor residual) -> Tensor")
def _onto(x_ND, weight_ED, residual_NE):
    return _by(x_ND).onto(x_ND.contiguous(), weight_ED.contiguous(), residual_NE.contiguous())


@fake(_onto)
def _(x_ND, weight_ED, residual_NE):
    return x_ND.new_empty(residual_NE.shape)


@opaque("linears(Tensor x, Tensor[] weights) -> Tensor")
def linears(x_ND, weights):
    """Products with several weights ``[E, D]`` behind each other: ``[N, sum of E]``."""
    return x_ND @ _as_one(*weights).T


@fake(linears)
def _(x_ND, weights):
    return x_ND.new_empty((x_ND.shape[0], sum(weight.shape[0] for weight in weights)))


@opaque("linears_input_gradient(Tensor grads, Tensor[] weights) -> Tensor")
def linears_input_gradient(grads_NE, weights):
    """Of the input of `linears`, ``[N, D]``."""
    return grads_NE @ _as_one(*weights)


@fake(linears_input_gradient)
def _(grads_NE, weights):
    return grads_NE.new_empty((grads_NE.shape[0], weights[0].shape[1]))


@opaque("weight_gradient(Tensor grads, Tensor x, Tensor[] weights) -> Tensor")
def weight_gradient(grads_NE, x_ND, weights):
    """Of weights ``[E, D]`` behind each other, ``[sum of E, D]``: what they have so far included (`adding_to_gradients`)."""
    return products_formulas.weight_gradient(grads_NE, x_ND, so_far(weights))


@fake(weight_gradient)
def _(grads_NE, x_ND, weights):
    return grads_NE.new_empty((grads_NE.shape[1], x_ND.shape[1]))


def _down(x_NF: torch.Tensor, down_DF: torch.Tensor, residual_ND: torch.Tensor | None) -> torch.Tensor:
    return x_NF @ down_DF.T if residual_ND is None else _onto(x_NF, down_DF, residual_ND)


# What recomputing them would take (see `activation_memory_budget`).
@register_flop_formula(torch.ops.preftree.gated_up)
def _(x_shape, gate_shape, *_, **__):
    return 4 * math.prod(gate_shape) * x_shape[0]


@register_flop_formula(torch.ops.preftree.linears)
def _(x_shape, weight_shapes, *_, **__):
    return 2 * sum(map(math.prod, weight_shapes)) * x_shape[0]


@register_flop_formula(torch.ops.preftree.product_onto)
def _(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(weight_shape) * x_shape[0]


class _LinearOnto(torch.autograd.Function):
    """See `linear_onto`."""

    @staticmethod
    def forward(ctx, x_ND, weight_ED, residual_NE):
        ctx.save_for_backward(x_ND if ctx.needs_input_grad[1] else None, weight_ED)
        return _onto(x_ND, weight_ED, residual_NE)

    @staticmethod
    def backward(ctx, grad_NE):
        x_ND, weight_ED = ctx.saved_tensors
        dx_ND = grad_NE @ weight_ED if ctx.needs_input_grad[0] else None
        return dx_ND, None if x_ND is None else weight_gradient(grad_NE, x_ND, [weight_ED]), grad_NE


class _GatedMlp(torch.autograd.Function):
    """See `gated_mlp`."""

    @staticmethod
    def forward(ctx, x_ND, gate_FD, up_FD, down_DF, residual_ND, activation):
        out_NF, both_NF2 = _up(x_ND, gate_FD, up_FD, activation, True)
        ctx.activation = activation
        ctx.save_for_backward(x_ND if any(ctx.needs_input_grad[1:3]) else None, gate_FD, up_FD, down_DF, both_NF2)
        return _down(out_NF, down_DF, residual_ND)

    @staticmethod
    def backward(ctx, grad_ND):
        x_ND, gate_FD, up_FD, down_DF, both_NF2 = ctx.saved_tensors
        wants_x, wants_gate, wants_up, wants_down, wants_residual, _ = ctx.needs_input_grad
        grads_NF2, out_NF = _up_backward(grad_ND, down_DF, both_NF2, ctx.activation)
        dx_ND = _input_gradient(grads_NF2, gate_FD, up_FD) if wants_x else None
        halves: Any = None, None
        if wants_gate or wants_up:
            halves = _weight_gradients(grads_NF2, x_ND, [gate_FD, up_FD]).chunk(2)
        ddown_DF = weight_gradient(grad_ND, out_NF, [down_DF]) if wants_down else None
        return dx_ND, *halves, ddown_DF, grad_ND if wants_residual else None, None


def _differentiated(*given: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)


@composite("linear_onto(Tensor x, Tensor weight, Tensor residual) -> Tensor")
def linear_onto(x: torch.Tensor, weight_ED: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``residual + x weight^T``, rounded once.

    Args:
        x: ``[..., D]``.
        weight_ED: as `torch.nn.Linear` holds it.
        residual: ``[..., E]``.
    """
    operands = x.flatten(0, -2), weight_ED, residual.flatten(0, -2)
    run: Any = _LinearOnto.apply if _differentiated(*operands) else _onto
    return run(*operands).view(residual.shape)


@composite("gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? residual, str activation) -> Tensor")
def gated_mlp(
    x: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """``residual + (activation(x gate^T) * (x up^T)) down^T``.

    Args:
        x: ``[..., D]``.
        gate_FD, up_FD, down_DF: weights, as `torch.nn.Linear` holds them.
        residual: what the result is added to, ``[..., D]``, if it is to anything.
        activation: of `ACTIVATIONS`: "swiglu" is SiLU's gated unit, "geglu" GELU's by its tanh formula.
    """
    x_ND, residual_ND = x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)
    if _differentiated(x, gate_FD, up_FD, down_DF, residual):
        out_ND = _GatedMlp.apply(x_ND, gate_FD, up_FD, down_DF, residual_ND, activation)
    else:
        out_ND = _down(_up(x_ND, gate_FD, up_FD, activation, False)[0], down_DF, residual_ND)
    return out_ND.view(*x.shape[:-1], down_DF.shape[0])
