"""Tree attention with the mask written out, ``[S, S]``: the specification, for tests and short rows on any device."""

from __future__ import annotations

from preftree.attention.layer import Layer
from preftree.attention.mask import Rule, visible_nodes
from preftree.attention.scores import masked_attention
from preftree.packing import PackedRow


def refusal(layer: Layer) -> str | None:
    """None: it serves every layer on every device."""
    return None


def bind(row: PackedRow, rule: Rule):
    """Attention over the whole row; time and memory grow with the square of the row's length."""
    visible_SS = visible_nodes(row, rule)

    def attend(q_BHSD, k_BGSD, v_BGSE, scores):
        return masked_attention(q_BHSD, k_BGSD, v_BGSE, visible_SS, scores)

    return attend
