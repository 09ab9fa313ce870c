"""What model families add to plain attention scores, and the reference arithmetic of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scores:
    """How a layer turns queries and keys into weights.

    Attributes:
        scale: factor on ``q k^T``.
        softcap: ``c`` of ``c tanh(x / c)``, applied to the scaled scores (Gemma 2), or None.
        sinks: ``[H]`` one learned logit per head that takes part in the softmax and has no value (gpt-oss), or None.
        bias: ``[1 or B, H, S, S]`` added to the scores of query and key in the row, or None.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scaled dot-product attention as every library has it computes this."""
        return self.softcap is None and self.sinks is None and self.bias is None


def repeat_heads(x_BGSD: torch.Tensor, heads: int) -> torch.Tensor:
    """Each key-value head once for every query head of its group, ``[B, H, S, D]``."""
    return x_BGSD if x_BGSD.shape[1] == heads else x_BGSD.repeat_interleave(heads // x_BGSD.shape[1], dim=1)


def masked_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKE: torch.Tensor,
    visible_QK: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Softmax attention over the visible keys, written out: the reference for everything else, ``[B, H, Q, E]``.

    ``scores.bias`` must already be cut to these queries and keys. The softmax is taken in at least float32.
    """
    heads = q_BHQD.shape[1]
    k_BHKD, v_BHKE = repeat_heads(k_BGKD, heads), repeat_heads(v_BGKE, heads)
    x_BHQK = (q_BHQD @ k_BHKD.transpose(-1, -2)) * scores.scale
    if scores.softcap is not None:
        x_BHQK = scores.softcap * torch.tanh(x_BHQK / scores.softcap)
    if scores.bias is not None:
        x_BHQK = x_BHQK + scores.bias
    x_BHQK = x_BHQK.to(torch.promote_types(x_BHQK.dtype, torch.float32))
    x_BHQK = x_BHQK.masked_fill(~visible_QK, float("-inf"))
    if scores.sinks is not None:
        sinks_BHQ1 = scores.sinks.to(x_BHQK.dtype).view(1, -1, 1, 1).expand(*x_BHQK.shape[:-1], 1)
        p_BHQK = torch.cat((x_BHQK, sinks_BHQ1), dim=-1).softmax(-1)[..., :-1]
    else:
        p_BHQK = x_BHQK.softmax(-1)
    return p_BHQK.to(v_BHKE.dtype) @ v_BHKE
