"""One optimizer step's micro-batch, row by row: what the pairs of all rows add up to, and the metrics of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from preftree.logprobs import SequenceLogps, sum_by_sequence
from preftree.objectives import Pairs, completion_weights
from preftree.packing import PackedRow


@dataclass
class MicroBatch:
    """The rows of a micro-batch and, filled in row by row, what each of its sequences gave.

    Sequence ``2 i`` is pair ``i``'s chosen one, ``2 i + 1`` its rejected one. Tensors are fp32 ``[2 pairs]``, detached.

    Attributes:
        rows: the rows to run.
        pairs: pairs in the micro-batch, over all rows.
        num_tokens: tokens of all sequences, the prompt counted in each.
        chosen_tokens: scored tokens of the chosen completions, over all rows.
        given_reference: cached reference log-probabilities ``[2 pairs]``, or None.
        gradient: the loss's gradient by sequence log-probability ``[2 pairs]``, where a first pass has found it.
        values: what has been recorded, by name.
    """

    rows: list[PackedRow]
    pairs: int
    num_tokens: int
    chosen_tokens: int
    given_reference: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> MicroBatch:
        """From what `TreeCollator` gives."""
        rows: list[PackedRow] = inputs["rows"]
        reference = None
        if "ref_chosen_logps" in inputs:
            reference = torch.stack((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]), dim=1).flatten()
        chosen_tokens = sum(int(row.scored_lengths[row.sequence_ids % 2 == 0].sum()) for row in rows)
        return cls(rows, len(inputs["index"]), int(inputs["num_tokens"]), chosen_tokens, reference)

    def record(self, row: PackedRow, **values: torch.Tensor) -> None:
        """Keep per-sequence values of a row, ``[n]`` each."""
        for name, value in values.items():
            value = value.detach()
            if name not in self.values:
                self.values[name] = torch.zeros(2 * self.pairs, dtype=value.dtype, device=value.device)
            self.values[name][row.sequence_ids.to(value.device)] = value

    def by_side(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Recorded values of chosen and rejected sequences, ``[pairs]`` each."""
        chosen, rejected = self.values[name].view(-1, 2).unbind(1)
        return chosen, rejected


def weighted_logps(out: SequenceLogps, ld_alpha: float | None) -> torch.Tensor:
    """Sequence log-probabilities ``[n]``, LD-DPO's weights applied where asked for; differentiable."""
    token_logps, lengths = out.token_logps, out.lengths
    if ld_alpha is None or token_logps is None or lengths is None or not lengths.numel():
        return _given(out.logps)
    return sum_by_sequence(token_logps * completion_weights(lengths, ld_alpha), lengths)


def wpo_weights(out: SequenceLogps) -> torch.Tensor:
    """WPO's weight of each sequence ``[n]``: ``exp(mean over its tokens of log p(y) - log sum_v p_v^2)``, no gradient.

    (Zhou et al., arXiv 2406.11827, eq. 2.)
    """
    aligned = _given(out.token_logps).detach() - _given(out.log_sum_sq_probs)
    lengths = _given(out.lengths)
    return (sum_by_sequence(aligned, lengths) / lengths.clamp(min=1)).exp()


def statistics(out: SequenceLogps) -> dict[str, torch.Tensor]:
    """Sums over each sequence's scored tokens ``[n]`` of what the metrics are made from."""
    lengths = _given(out.lengths)
    return {
        "tokens": lengths.float(),
        "entropy": sum_by_sequence(_given(out.entropy), lengths),
        "mean_logits": sum_by_sequence(_given(out.mean_logits), lengths),
        "top1": sum_by_sequence(_given(out.is_top1).float(), lengths),
    }


def pairs_of(
    batch: MicroBatch, lengths: torch.Tensor, logps: torch.Tensor, plain: torch.Tensor, ref: torch.Tensor
) -> Pairs:
    """Sequences (chosen, rejected, chosen, ...) as pairs for the objectives.

    Args:
        lengths: LongTensor ``[n]``, completion tokens of each sequence.
        logps, plain, ref: fp32 ``[n]``, log-probabilities: the policy's as the loss takes them, its plain sums, and the
            reference's.
    """

    def sides(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = values.view(-1, 2).unbind(1)
        return chosen, rejected

    return Pairs(*sides(logps), *sides(ref), *sides(lengths), sides(plain)[0], batch.chosen_tokens / batch.pairs)


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("this needs token statistics: call sequence_logps with statistics=True")
    return value
