"""What one layer asks of attention, as far as backends differ in what they can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from preftree.attention.mask import Rule
from preftree.attention.scores import Scores


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Layer:
    """Shapes, types and features of a layer's call, without its tensors.

    Attributes:
        device: "cuda", "cpu", ...
        capability: compute capability of a CUDA device, else None.
        dtype: of queries, keys and values.
        heads, groups: query heads, key-value heads.
        size, value_size: head size of queries and keys, and of values.
        rule: the family's rule.
        softcap, sinks, bias: which of `Scores` it uses.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    heads: int
    groups: int
    size: int
    value_size: int
    rule: Rule
    softcap: bool = False
    sinks: bool = False
    bias: bool = False

    @classmethod
    def of(cls, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSE: torch.Tensor, rule: Rule, scores: Scores) -> Layer:
        """The layer that makes this call."""
        device = q_BHSD.device
        return cls(
            device=device.type,
            capability=_capability(device),
            dtype=q_BHSD.dtype,
            heads=q_BHSD.shape[1],
            groups=k_BGSD.shape[1],
            size=q_BHSD.shape[-1],
            value_size=v_BGSE.shape[-1],
            rule=rule,
            softcap=scores.softcap is not None,
            sinks=scores.sinks is not None,
            bias=scores.bias is not None,
        )
