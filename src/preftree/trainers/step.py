"""One micro-batch, row by row: what the loss of all its rows is made of, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        gradient: the gradient of a loss that is no sum over rows, where a first pass has found it.
        values: what has been recorded of each sequence, by name.
        aux_loss: a mixture of experts' auxiliary loss, where it is asked for.
    """

    rows: list[PackedRow]
    pairs: int
    num_tokens: int
    chosen_tokens: int
    given_reference: torch.Tensor | None = None
    gradient: Gradient | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    aux_loss: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> MicroBatch:
        """From what `TreeCollator` gives."""
        rows: list[PackedRow] = inputs["rows"]
        reference = None
        if "ref_chosen_logps" in inputs:
            reference = torch.stack((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]), dim=1).flatten()
        return cls(rows, len(inputs["index"]), inputs["num_tokens"], inputs["chosen_tokens"], reference)

    def record(self, row: PackedRow, **values: torch.Tensor) -> None:
        """Keep per-sequence values of a row, ``[n]`` each."""
        for name, value in values.items():
            value = value.detach()
            if name not in self.values:
                self.values[name] = torch.zeros(2 * self.pairs, dtype=value.dtype, device=value.device)
            self.values[name][row.sequence_ids.to(value.device)] = value

    def by_side(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Recorded values of chosen and rejected sequences, ``[pairs]`` each."""
        return by_side(self.values[name])


@dataclass
class Terms:
    """What a loss is computed from: ``n`` sequences (chosen, rejected, chosen, ...) of a row or a whole micro-batch.

    Attributes:
        lengths: LongTensor ``[n]``, completion tokens.
        logps: fp32 ``[n]``, the policy's log-probabilities as the loss takes them (LD-DPO: weighted sums).
        plain: fp32 ``[n]``, its unweighted sums.
        ref: fp32 ``[n]``, the reference's, as the loss takes them.
        weights: fp32 ``[n]``, WPO's weights, or None.
        expert_counts, expert_probs: fp32 ``[E]``, see `SequenceLogps`, or None.
    """

    lengths: torch.Tensor
    logps: torch.Tensor
    plain: torch.Tensor
    ref: torch.Tensor
    weights: torch.Tensor | None = None
    expert_counts: torch.Tensor | None = None
    expert_probs: torch.Tensor | None = None

    @classmethod
    def join(cls, rows: Sequence[PackedRow], parts: Sequence[Terms]) -> Terms:
        """The terms of several rows as those of one micro-batch, sequences in order."""
        order = torch.cat([row.sequence_ids for row in rows]).argsort().to(parts[0].logps.device)

        def by_sequence(values: list[Any]) -> Any:
            return None if values[0] is None else torch.cat(values)[order]

        def in_sum(values: list[Any]) -> Any:
            return None if values[0] is None else torch.stack(values).sum(0)

        return cls(
            *(by_sequence([getattr(part, name) for part in parts]) for name in _BY_SEQUENCE),
            *(in_sum([getattr(part, name) for part in parts]) for name in _BY_EXPERT),
        )


_BY_SEQUENCE = ("lengths", "logps", "plain", "ref", "weights")
_BY_EXPERT = ("expert_counts", "expert_probs")


@dataclass
class Gradient:
    """A micro-batch's loss and its gradient by what its rows add up to: rows can then be run one by one.

    Attributes:
        loss: the loss, detached.
        logps, plain: ``[2 pairs]``, by each sequence's log-probabilities.
        expert_probs: ``[E]``, or None.
    """

    loss: torch.Tensor
    logps: torch.Tensor
    plain: torch.Tensor
    expert_probs: torch.Tensor | None = None

    @classmethod
    def of(cls, loss: Callable[[Terms], torch.Tensor], whole: Terms) -> Gradient:
        """Of a function of the whole micro-batch's terms."""
        names = [name for name in ("logps", "plain", "expert_probs") if getattr(whole, name) is not None]
        leaves = {name: getattr(whole, name).detach().requires_grad_() for name in names}
        with torch.enable_grad():
            value = loss(Terms(**{**vars(whole), **leaves}))
            gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return cls(value.detach(), **dict(zip(leaves, gradients, strict=True)))

    def linear(self, row: PackedRow, out: SequenceLogps, logps: torch.Tensor) -> torch.Tensor:
        """A function of one row's terms that has the loss's gradient; summed over rows it is its linear part."""
        sequences = row.sequence_ids
        value = (self.logps[sequences] * logps).sum() + (self.plain[sequences] * out.logps).sum()
        if self.expert_probs is not None:
            value = value + (self.expert_probs * _given(out.expert_probs)).sum()
        return value


def weighted_logps(out: SequenceLogps, ld_alpha: float | None) -> torch.Tensor:
    """Sequence log-probabilities ``[n]``, LD-DPO's weights applied where asked for; differentiable."""
    token_logps, lengths = out.token_logps, out.lengths
    if ld_alpha is None or token_logps is None or lengths is None or not lengths.numel():
        return out.logps
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


def by_side(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of sequences (chosen, rejected, chosen, ...) ``[n]`` as chosen and rejected, ``[n / 2]`` each."""
    return values[0::2], values[1::2]


def pairs_of(batch: MicroBatch, terms: Terms) -> Pairs:
    """A row's or micro-batch's sequences as pairs for the objectives."""
    return Pairs(
        *by_side(terms.logps),
        *by_side(terms.ref),
        *by_side(terms.lengths),
        chosen_plain=by_side(terms.plain)[0],
        tokens_per_chosen=batch.chosen_tokens / batch.pairs,
    )


def metrics(batch: MicroBatch, beta: float, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """TRL's metrics of one micro-batch, from its whole record: they do not depend on how it was cut into rows.

    Args:
        gather: collects tensors of all ranks along their first dimension.
    """
    chosen, rejected = batch.by_side("logps")
    ref_chosen, ref_rejected = batch.by_side("ref")
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    sums = [torch.stack(batch.by_side(name)).sum(1) for name in ("tokens", "entropy", "mean_logits", "top1")]
    # [metric, side], summed over ranks: token metrics weigh by tokens, the others by pairs.
    tokens, entropy, mean_logits, top1 = gather(torch.stack(sums)[None]).sum(0)
    result = {
        "entropy": _ratio(entropy.sum(), tokens.sum()),
        "logits/chosen": _ratio(mean_logits[0], tokens[0]),
        "logits/rejected": _ratio(mean_logits[1], tokens[1]),
        "mean_token_accuracy": _ratio(top1[0], tokens[0]),
    }
    by_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    if batch.aux_loss is not None:
        by_pair["aux_loss"] = batch.aux_loss[None]
    return result | {name: gather(values).mean().item() for name, values in by_pair.items()}


def _ratio(total: torch.Tensor, count: torch.Tensor) -> float:
    return (total / count).item() if count > 0 else 0.0


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("this needs token statistics: call sequence_logps with statistics=True")
    return value
