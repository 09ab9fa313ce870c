"""Where a stock model places the tokens of a padded batch, and whether moving a sequence matters to it.

Families differ: most count from the start of the row, padding included; some from the attention mask. It is found out
by running the stock model, not by a family's name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preftree.models.prepared import PreparedModel
from preftree.models.replaced import in_evaluation

_TOKENS = 8
_PADDING = 3
# Of the root mean square of the hidden states.
_TOLERANCE = 1e-4
# No row is longer.
_FARTHEST = 1 << 17


@dataclass(frozen=True)
class StockPositions:
    """How the stock model places tokens.

    Attributes:
        left_padding: what a left-padded row without position_ids is counted by: "row" (its first token gets the number
            of paddings before it), "mask" (its first token gets 0), or None if it is neither.
        invariant_below: sequences whose positions all lie below this can be moved to start at 0, with hidden states equal
            to rounding; 0 if moving a sequence changes them.
    """

    left_padding: str | None
    invariant_below: int


@torch.no_grad()
def find_stock_positions(prepared: PreparedModel) -> StockPositions:
    """Try the stock model on a few rows of some ten tokens."""
    with in_evaluation(prepared.model):
        return StockPositions(_counted_by(prepared), _invariant_below(prepared))


def _hidden(prepared: PreparedModel, **inputs: torch.Tensor) -> torch.Tensor:
    return prepared.backbone(use_cache=False, **inputs).last_hidden_state


def _tokens(prepared: PreparedModel, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(20410)
    return torch.randint(prepared.vocabulary_size, (1, count), generator=generator).to(prepared.device)


def _counted_by(prepared: PreparedModel) -> str | None:
    """A left-padded row without positions must give, bit for bit, what it gives with the positions named."""
    ids = _tokens(prepared, _PADDING + _TOKENS)
    index = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = (index >= _PADDING).long()
    unnamed = _hidden(prepared, input_ids=ids, attention_mask=mask)[:, _PADDING:]
    for name, positions in (("row", index), ("mask", (index - _PADDING).clamp(min=0))):
        named = _hidden(prepared, input_ids=ids, attention_mask=mask, position_ids=positions)[:, _PADDING:]
        if torch.equal(named, unnamed):
            return name
    return None


def _invariant_below(prepared: PreparedModel) -> int:
    """The same tokens at positions farther and farther out, as long as the hidden states stay the same to rounding."""
    limit = getattr(prepared.model.config.get_text_config(), "max_position_embeddings", None)
    if prepared.dtype not in (torch.float32, torch.float64) or not isinstance(limit, int) or limit <= _TOKENS:
        # Half precision cannot tell rounding from a small change; beyond an unknown limit a table of positions ends.
        return 0
    ids = _tokens(prepared, _TOKENS)
    farthest = min(limit, _FARTHEST) - _TOKENS
    offsets = [1 << power for power in range(farthest.bit_length()) if 1 << power < farthest] + [farthest]
    position_ids = torch.tensor([0, *offsets], device=ids.device)[:, None] + torch.arange(_TOKENS, device=ids.device)
    hidden_NLH = _hidden(prepared, input_ids=ids.expand(len(position_ids), -1), position_ids=position_ids).double()
    rms = float(hidden_NLH[0].square().mean().sqrt())
    below = 0
    for offset, hidden_LH in zip(offsets, hidden_NLH[1:], strict=True):
        # The angles of rotary embeddings are products with the position, rounded to its size.
        tolerance = max(_TOLERANCE, torch.finfo(prepared.dtype).eps * offset) * rms
        if not float((hidden_LH - hidden_NLH[0]).abs().max()) <= tolerance:
            break
        below = offset + _TOKENS
    return below
