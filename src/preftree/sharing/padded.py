"""A padded batch as one row of trees, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from preftree.packing import PackedRow, pack, static_length
from preftree.tree import TokenTree


@dataclass
class PaddedBatch:
    """Where the tokens of a padded batch stand; all tensors on the host.

    Attributes:
        input_ids: LongTensor ``[B, L]``.
        start: LongTensor ``[B]``, index of each row's first token that is not padding.
        length: LongTensor ``[B]``, tokens of each row that are not padding, one behind the other; 0 for an empty row.
    """

    input_ids: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor

    @classmethod
    def read(cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> PaddedBatch | None:
        """Read a batch ``[B, L]`` and its mask (0 at padding); None if a row has padding between its tokens."""
        ids_BL = input_ids.detach().cpu()
        real_BL = torch.ones_like(ids_BL, dtype=torch.bool) if attention_mask is None else (attention_mask != 0).cpu()
        length = real_BL.sum(1)
        start = real_BL.int().argmax(1)
        index = torch.arange(ids_BL.shape[1])
        contiguous = (index >= start[:, None]) & (index < (start + length)[:, None])
        return cls(ids_BL, start, length) if torch.equal(contiguous, real_BL) else None

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Raise `ValueError` for a token outside ``0 .. vocabulary_size - 1``, naming it and its place."""
        for index, sequence in enumerate(self.sequences()):
            wrong = ((sequence < 0) | (sequence >= vocabulary_size)).nonzero()
            if len(wrong):
                where = int(wrong[0])
                raise ValueError(
                    f"input_ids[{index}, {int(self.start[index]) + where}] is {int(sequence[where])}, outside the model's "
                    f"vocabulary of {vocabulary_size}"
                )

    def sequences(self) -> list[Any]:
        """The tokens of each row without its padding, a LongTensor ``[length]`` each."""
        starts, lengths = self.start.tolist(), self.length.tolist()
        return [self.input_ids[i, start : start + lengths[i]] for i, start in enumerate(starts)]

    def first_positions(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """Each row's first position, LongTensor ``[B]``, of ``position_ids [B or 1, L]``; None unless they count up."""
        if position_ids.ndim != 2 or position_ids.shape[1] != self.input_ids.shape[1]:
            return None
        if position_ids.shape[0] not in (1, len(self.start)):
            return None
        positions_BL = position_ids.cpu().expand(self.input_ids.shape)
        first = positions_BL.gather(1, self.start[:, None])[:, 0]
        behind = torch.arange(positions_BL.shape[1]) - self.start[:, None]
        padding = (behind < 0) | (behind >= self.length[:, None])
        counts_up = bool(((positions_BL - first[:, None] == behind) | padding).all())
        return torch.where(self.length > 0, first, 0) if counts_up else None


@dataclass
class MergedBatch:
    """A padded batch merged into one row.

    Attributes:
        row: the row; its own positions count from each sequence's first token.
        position_ids: LongTensor ``[S]``, positions that the model gets.
        place: LongTensor ``[N]``, where the batch's ``N`` tokens stand in ``[B, L]``, flattened.
        node: LongTensor ``[N]``, the row's node of each of them.
        shape: ``(B, L)``.
    """

    row: PackedRow
    position_ids: torch.Tensor
    place: torch.Tensor
    node: torch.Tensor
    shape: torch.Size

    def spread(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """Hidden states of the row's nodes at the batch's tokens, ``[B, L, hidden]``, zero at padding."""
        device = hidden_SH.device
        hidden_NH = hidden_SH.index_select(0, self.node.to(device))
        spread = hidden_SH.new_zeros(self.shape.numel(), hidden_SH.shape[-1])
        return spread.index_copy(0, self.place.to(device), hidden_NH).view(*self.shape, -1)


def merge(batch: PaddedBatch, first_positions: torch.Tensor, fixed_lengths: bool = False) -> MergedBatch:
    """Merge the rows of a batch that start alike, at the same position.

    Args:
        first_positions: LongTensor ``[B]``, position of each row's first token.
        fixed_lengths: round the row up to one of a few lengths, for kernels that are compiled for each.

    Raises:
        ValueError: if the batch holds nothing but padding.
    """
    sequences = batch.sequences()
    members: dict[int, list[int]] = {}
    for index, position in enumerate(first_positions.tolist()):
        if len(sequences[index]):
            members.setdefault(position, []).append(index)
    trees = [
        # Nothing is scored here: all of a sequence counts as its prompt.
        TokenTree.from_sequences([sequences[i] for i in group], [len(sequences[i]) for i in group])
        for group in members.values()
    ]
    total = sum(len(tree) for tree in trees)
    (row,) = pack(trees, static_length(total) if fixed_lengths else None)
    position_ids = row.position_ids.clone()
    places, nodes = [], []
    first = 0
    for tree, (position, group) in zip(trees, members.items(), strict=True):
        position_ids[first : first + len(tree)] += position
        for path, index in zip(tree.paths, group, strict=True):
            places.append(torch.arange(len(path)) + index * batch.input_ids.shape[1] + batch.start[index])
            nodes.append(path + first)
        first += len(tree)
    return MergedBatch(row, position_ids, torch.cat(places), torch.cat(nodes), batch.input_ids.shape)
