"""What `products_quack`'s kernels are to compute, operation by operation."""

from __future__ import annotations

import torch
from torch.nn import functional


def _in_turns(gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
    return torch.stack((gate_NF, up_NF), -1).flatten(-2)


def _apart(both_NF2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate_NF, up_NF = both_NF2.unflatten(-1, (-1, 2)).unbind(-1)
    return gate_NF.contiguous(), up_NF.contiguous()


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    return functional.silu(gate) if activation == "swiglu" else functional.gelu(gate, approximate="tanh")


def up(
    x_ND: torch.Tensor, weights_F2D: torch.Tensor, activation: str, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``activation(gate) * up``, ``[N, F]``, and gate and up in turns, ``[N, 2 F]``, or empty unless these are kept.

    Args:
        x_ND: the MLP's input.
        weights_F2D: those of gate and up behind each other, ``[2 F, D]``.
        activation: of `products.ACTIVATIONS`.
        keeps: whether gate and up are wanted, for the backward pass.
    """
    gate_NF, up_NF = (x_ND @ weights_F2D.T).chunk(2, -1)
    return _activate(gate_NF, activation) * up_NF, _in_turns(gate_NF, up_NF) if keeps else x_ND.new_empty(0)


def up_backward(
    grad_ND: torch.Tensor, down_DF: torch.Tensor, both_NF2: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up in turns, ``[N, 2 F]``, from that of the MLP's output; and `up`'s first result again."""
    gate_NF, up_NF = _apart(both_NF2)
    grad_NF = grad_ND @ down_DF
    activated_NF = _activate(gate_NF, activation)
    if activation == "swiglu":
        dgate_NF = torch.ops.aten.silu_backward(grad_NF * up_NF, gate_NF)
    else:
        dgate_NF = torch.ops.aten.gelu_backward(grad_NF * up_NF, gate_NF, approximate="tanh")
    return _in_turns(dgate_NF, grad_NF * activated_NF), activated_NF * up_NF


def input_gradient(grads_NF2: torch.Tensor, weights_F2D: torch.Tensor) -> torch.Tensor:
    """Of the MLP's input, ``[N, D]``, from those of gate and up in turns."""
    return torch.cat(_apart(grads_NF2), -1) @ weights_F2D


def weight_gradient(grads_NE: torch.Tensor, x_ND: torch.Tensor, so_far_ED: torch.Tensor | None = None) -> torch.Tensor:
    """Of weights ``[E, D]``; with gradients so far it is these that they are added to."""
    return grads_NE.T @ x_ND if so_far_ED is None else so_far_ED.addmm_(grads_NE.T, x_ND)


def weight_gradients(
    grads_NF2: torch.Tensor, x_ND: torch.Tensor, so_far_F2D: torch.Tensor | None = None
) -> torch.Tensor:
    """`weight_gradient` of gate and up, behind each other, ``[2 F, D]``, from their gradients in turns."""
    return weight_gradient(torch.cat(_apart(grads_NF2), -1), x_ND, so_far_F2D)


def onto(x_ND: torch.Tensor, weight_ED: torch.Tensor, residual_NE: torch.Tensor) -> torch.Tensor:
    """``residual + x weight^T``, ``[N, E]``."""
    return residual_NE + x_ND @ weight_ED.T
