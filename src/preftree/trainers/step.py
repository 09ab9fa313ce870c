"""One micro-batch, row by row: what the loss of all its rows is made of, and what its metrics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from preftree.logprobs import SequenceLogps, sum_by_sequence
from preftree.objectives import Pairs, completion_weights, wpo_weight
from preftree.packing import PackedRow

Members = dict[str, torch.Tensor]
# Of the members, what belongs to ranked lists; the rest belongs to units.
_OF_LISTS = ("ranking", "sizes")


@dataclass
class MicroBatch:
    """The rows of a micro-batch and, filled in row by row, what each of its sequences gave.

    A unit is what the objective gives one loss for: a pair, or a single completion. It names one sequence for each side.

    Attributes:
        rows: the rows to run.
        members: for each row, its units (see `TreeCollator`).
        weights: fp32 ``[units]``, of the units in the loss.
        normaliser: what they have been divided by.
        lists: ranked lists in the micro-batch.
        tokens: scored tokens of each side over all units and rows.
        num_tokens: tokens of all sequences, the prompt counted in each.
        group_sizes: how many sequences each example of the data has.
        reference: fp32 ``[sequences]``, cached reference log-probabilities, or None.
        columns: numbers of the data, fp32 ``[examples]`` each.
        tokens_of_ranks: `num_tokens` of all ranks.
        gradient: the gradient of a loss that is no sum over rows, where a first pass has found it.
        values: what has been recorded of each sequence, by name, detached ``[sequences]``.
        scalars: what has been recorded of the micro-batch as a whole.
    """

    rows: list[PackedRow]
    members: list[Members]
    weights: torch.Tensor
    normaliser: float
    lists: int
    tokens: dict[str, int]
    num_tokens: int
    group_sizes: list[int]
    reference: torch.Tensor | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens_of_ranks: int = 0
    gradient: Gradient | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], columns: Sequence[str] = ()) -> MicroBatch:
        """From what `TreeCollator` gives."""
        return cls(
            rows=list(inputs["rows"]),
            members=list(inputs["members"]),
            weights=inputs["weights"],
            normaliser=inputs["normaliser"],
            lists=inputs["lists"],
            tokens=inputs["tokens"],
            num_tokens=inputs["num_tokens"],
            tokens_of_ranks=inputs["num_tokens"],
            group_sizes=inputs["group_sizes"],
            reference=inputs.get("reference"),
            columns={name: inputs[name] for name in columns if name in inputs},
        )

    @property
    def units(self) -> int:
        return self.weights.numel()

    @property
    def examples(self) -> int:
        return len(self.group_sizes)

    def align(self, plain: PackedRow, without_images: int, with_images: int) -> None:
        """As many rows of either kind, those with images last: ones without sequences are added to fewer.

        They add nothing, but take part in what ranks do together. A row that is to have images, where none has, has none.

        Args:
            plain: a row of padding.
            without_images, with_images: how many rows of either kind there are to be.
        """
        rows = sorted(zip(self.rows, self.members, strict=True), key=lambda row: row[0].images is not None)
        none = {name: indices[:0] for name, indices in self.members[0].items()}
        seen = self.rows_with_images
        more = without_images - (len(rows) - seen)
        last = plain if not seen else rows[-1][0].without_sequences()
        rows = (
            [(replace(plain, derived={}), none) for _ in range(more)]
            + rows
            + [(replace(last, derived={}), none) for _ in range(with_images - seen)]
        )
        self.rows, self.members = [row for row, _ in rows], [members for _, members in rows]

    @property
    def rows_with_images(self) -> int:
        return sum(row.images is not None for row in self.rows)

    def record(self, row: PackedRow, **values: torch.Tensor) -> None:
        """Keep per-sequence values of a row, ``[n]`` each."""
        for name, value in values.items():
            value = value.detach()
            if name not in self.values:
                shape = (sum(self.group_sizes), *value.shape[1:])
                self.values[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)
            self.values[name][row.sequence_ids.to(value.device)] = value

    @cached_property
    def joined(self) -> Members:
        """The members of all rows as those of one row that holds every sequence in order, units in order too."""
        parts = [
            {
                name: indices if name in ("unit", "sizes") else row.sequence_ids.to(indices.device)[indices]
                for name, indices in members.items()
            }
            for row, members in zip(self.rows, self.members, strict=True)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = joined["unit"].argsort()
        return {name: indices if name in _OF_LISTS else indices[order] for name, indices in joined.items()}

    def side(self, side: str, name: str) -> torch.Tensor:
        """Recorded values of a side's sequences, ``[units]``, units in order."""
        values = self.values[name]
        return values[self.joined[side].to(values.device)]


@dataclass
class Terms:
    """What a loss is computed from: the ``n`` sequences of a row or of a whole micro-batch.

    Attributes:
        members: their units.
        values: by name, ``[n]``: "logps", "lengths", ...
        totals: by name, sums over all tokens (see `SequenceLogps.expert_counts`).
    """

    members: Members
    values: dict[str, torch.Tensor]
    totals: dict[str, torch.Tensor] = field(default_factory=dict)

    def side(self, side: str, name: str) -> torch.Tensor:
        """Values of a side's sequences, ``[units]``."""
        values = self.values[name]
        return values[self.members[side].to(values.device)]

    @classmethod
    def join(cls, batch: MicroBatch, parts: Sequence[Terms]) -> Terms:
        """The terms of a micro-batch's rows as those of the whole."""
        order = torch.cat([row.sequence_ids for row in batch.rows]).argsort()

        def in_order(values: list[torch.Tensor]) -> torch.Tensor:
            joined = torch.cat(values)
            return joined[order.to(joined.device)]

        return cls(
            batch.joined,
            {name: in_order([part.values[name] for part in parts]) for name in parts[0].values},
            {name: torch.stack([part.totals[name] for part in parts]).sum(0) for name in parts[0].totals},
        )


@dataclass
class Gradient:
    """A micro-batch's loss and its gradient by what its rows add up to: rows can then be run one by one.

    Attributes:
        loss: the loss, detached.
        values: by each sequence's values, ``[sequences]``.
        totals: by the totals.
    """

    loss: torch.Tensor
    values: dict[str, torch.Tensor]
    totals: dict[str, torch.Tensor]

    @classmethod
    def of(cls, loss: Callable[[Terms], torch.Tensor], whole: Terms) -> Gradient:
        """Of a function of the whole micro-batch's terms."""
        values, totals = _leaves(whole.values), _leaves(whole.totals)
        wanted = [value for value in (*values.values(), *totals.values()) if value.requires_grad]
        with torch.enable_grad():
            result = loss(Terms(whole.members, values, totals))
            gradients = iter(torch.autograd.grad(result, wanted, materialize_grads=True))
        by_values, by_totals = (
            {name: next(gradients) for name, value in named.items() if value.requires_grad}
            for named in (values, totals)
        )
        return cls(result.detach(), by_values, by_totals)

    def linear(self, row: PackedRow, terms: Terms) -> torch.Tensor:
        """A function of one row's terms that has the loss's gradient; summed over rows it is its linear part."""
        value = torch.zeros((), device=self.loss.device)
        for name, own in terms.values.items():
            if own.requires_grad:
                value = value + (self.values[name][row.sequence_ids.to(own.device)] * own).sum()
        for name, own in terms.totals.items():
            if own.requires_grad:
                value = value + (self.totals[name] * own).sum()
        return value


def _leaves(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers cut off from where they come from; those that have a gradient ask for it."""
    return {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in named.items()}


def mean_nll(batch: MicroBatch, source: MicroBatch | Terms, side: str) -> torch.Tensor:
    """The share of these terms (or of the whole record) in the micro-batch's mean negative log-likelihood, over the tokens
    of a side."""
    return -source.side(side, "logps").sum() / batch.tokens[side]


def pairs_without_reference(source: MicroBatch | Terms) -> Pairs:
    """The pairs of a row's terms, or of a micro-batch's record; lengths are tokens that have a prediction."""
    return Pairs(
        chosen=source.side("chosen", "logps"),
        rejected=source.side("rejected", "logps"),
        chosen_lengths=source.side("chosen", "scored"),
        rejected_lengths=source.side("rejected", "scored"),
    )


def weighted_logps(out: SequenceLogps, ld_alpha: float | None) -> torch.Tensor:
    """Sequence log-probabilities ``[n]``, LD-DPO's weights applied where asked for; differentiable.

    LD-DPO's sequences are those of pairs: chosen, rejected, chosen, ... (`Layout.per_pair`).
    """
    token_logps, lengths = out.token_logps, out.lengths
    if ld_alpha is None or token_logps is None or lengths is None or not lengths.numel():
        return out.logps
    return sum_by_sequence(token_logps * completion_weights(lengths, ld_alpha), lengths, out.longest)


def wpo_weights(out: SequenceLogps) -> torch.Tensor:
    """WPO's weight of each sequence ``[n]`` (see `objectives.wpo_weight`)."""
    lengths = _given(out.lengths)
    return wpo_weight(out.logps, sum_by_sequence(_given(out.log_sum_sq_probs), lengths, out.longest), lengths)


def statistics(out: SequenceLogps) -> dict[str, torch.Tensor]:
    """Sums over each sequence's scored tokens ``[n]`` of what the metrics are made from."""
    lengths = _given(out.lengths)

    def summed(values: torch.Tensor | None) -> torch.Tensor:
        return sum_by_sequence(_given(values).float(), lengths, out.longest)

    return {
        "tokens": lengths.float(),
        "entropy": summed(out.entropy),
        "mean_logits": summed(out.mean_logits),
        "top1": summed(out.is_top1),
    }


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("this needs token statistics: call sequence_logps with statistics=True")
    return value
