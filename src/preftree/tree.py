"""Token sequences merged into trees: every distinct prefix once, laid out in preorder in one row.

A tree of ``S`` nodes is four arrays of length ``S`` (see :class:`TokenTree`). Key ``k`` is visible to query ``q``
if and only if ``k <= q < end[k]``: that single rule covers causal attention, packed documents, padding and any
shared prefix.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch

from preftree.images import Images, PromptImages


def _token_array(sequence: Sequence[int], index: int) -> np.ndarray:
    """``sequence`` as int64 ``[L]``; raises `ValueError` naming the sequence if it is no list of token ids."""
    if isinstance(sequence, torch.Tensor):
        sequence = sequence.detach().cpu().numpy()
    array = np.asarray(sequence)
    if array.ndim != 1:
        raise ValueError(f"sequence {index} must be a flat list of token ids, got an array of shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"sequence {index} is empty: a sequence needs at least one token")
    if array.dtype.kind not in "iu":
        raise ValueError(f"sequence {index} must hold integers (token ids), got elements of type {array.dtype}")
    array = array.astype(np.int64, copy=False)
    if array.min() < 0:
        where = int(np.flatnonzero(array < 0)[0])
        raise ValueError(f"sequence {index}, token {where}: id {int(array[where])} is negative")
    return array


def _integer(prompt_length: SupportsIndex, index: int) -> int:
    try:
        return operator.index(prompt_length)
    except TypeError as error:
        raise ValueError(f"sequence {index}: prompt length {prompt_length!r} is not an integer") from error


def _common_prefix(first: np.ndarray, other: np.ndarray, start: int) -> int:
    """Length of the common prefix of two sequences that are known to agree before ``start``."""
    stop = min(len(first), len(other))
    differs = first[start:stop] != other[start:stop]
    first_difference = int(differs.argmax()) if differs.size else 0
    return start + first_difference if differs.size and differs[first_difference] else stop


@dataclass
class TokenTree:
    """A trie of tokens in preorder (depth first; children in the order in which the sequences introduce them).

    Attributes:
        input_ids: LongTensor ``[S]``, the token of each node.
        position_ids: LongTensor ``[S]``, the node's depth, which is the position of its token in its own sequence.
        end: LongTensor ``[S]``, one past the last node of the node's subtree.
        parent: LongTensor ``[S]``, the node before it in its sequence, -1 at a root.
        paths: for each of the ``n`` sequences, LongTensor ``[L_i]`` of its nodes, from the first token to the last.
        prompt_lengths: LongTensor ``[n]``, how many leading tokens of each sequence are not scored.
        multiplicities: LongTensor ``[n]``, how often each sequence counts in sums over the tokens of all sequences.
        images: of the sequences' prompts, or None.

    Several roots are allowed: sequences that do not even share the first token form a forest.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor
    parent: torch.Tensor
    paths: list[torch.Tensor]
    prompt_lengths: torch.Tensor
    multiplicities: torch.Tensor
    images: Images | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        multiplicities: Sequence[int] | None = None,
        images: PromptImages | None = None,
    ) -> TokenTree:
        """Merge token sequences that start alike.

        Args:
            sequences: ``n`` non-empty lists of token ids. Duplicates are allowed, as is a sequence that is a prefix of
                another: their nodes are shared, and each sequence keeps a path of its own.
            prompt_lengths: ``n`` integers with ``0 <= prompt_lengths[i] <= len(sequences[i])``. Tokens from
                ``prompt_lengths[i]`` on are scored. Nodes are shared by token, wherever the prompt ends. A sequence's
                very first token has nothing before it to predict it and is never scored, even for prompt length 0.
            multiplicities: ``n`` integers, how often each sequence counts in sums over the tokens of all sequences (a
                response that stands in three pairs counts three times); 1 where they are not given.
            images: what all sequences begin with, beside their tokens. Ids cannot tell one image from another: sequences
                with other images belong into another tree.

        Raises:
            ValueError: for an empty sequence, ids that are no integers or negative, prompt lengths or multiplicities that
                do not fit, or sequences that do not share the images' tokens.
        """
        arrays = [_token_array(sequence, index) for index, sequence in enumerate(sequences)]
        if not arrays:
            raise ValueError("a tree needs at least one sequence")
        if len(prompt_lengths) != len(arrays):
            raise ValueError(f"{len(arrays)} sequences, but {len(prompt_lengths)} prompt lengths")
        prompt_lengths = [_integer(length, index) for index, length in enumerate(prompt_lengths)]
        for index, (array, length) in enumerate(zip(arrays, prompt_lengths, strict=True)):
            if not 0 <= length <= len(array):
                raise ValueError(
                    f"sequence {index}: prompt length {length} is outside 0 .. {len(array)}, the sequence's own length"
                )

        if multiplicities is None:
            multiplicities = [1] * len(arrays)
        if len(multiplicities) != len(arrays) or min(multiplicities) < 0:
            raise ValueError(f"multiplicities must be {len(arrays)} numbers of at least 0, got {list(multiplicities)}")

        if images is not None:
            _check_shared(arrays, images.length)

        tokens: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        parents: list[np.ndarray] = []
        runs_of: list[list[np.ndarray]] = [[] for _ in arrays]
        size = 0
        # A stack of groups of sequences that agree on their first `depth` tokens. Each step lays out one unbranched run
        # of nodes and pushes the groups that branch off behind it, the last child first. `ends` of a run is known only
        # once all that hangs below it is laid out: a marker on the stack closes the run then.
        stack: list[tuple[list[int], int, int] | np.ndarray] = []
        children = _group_by_token(arrays, range(len(arrays)), 0)
        stack.extend((group, 0, -1) for group in reversed(children))
        while stack:
            item = stack.pop()
            if isinstance(item, np.ndarray):
                item[:] = size
                continue
            group, depth, parent = item
            first = arrays[group[0]]
            stop = len(first)
            for other in group[1:]:
                stop = min(stop, _common_prefix(first, arrays[other], depth))
            length = stop - depth
            run = np.arange(size, size + length)
            tokens.append(first[depth:stop])
            positions.append(np.arange(depth, stop))
            parents.append(np.concatenate(([parent], run[:-1])))
            end = np.empty(length, dtype=np.int64)
            ends.append(end)
            for member in group:
                runs_of[member].append(run)
            size += length
            stack.append(end)
            longer = [member for member in group if len(arrays[member]) > stop]
            children = _group_by_token(arrays, longer, stop)
            stack.extend((child, stop, size - 1) for child in reversed(children))
        return cls(
            images=None if images is None else _on_nodes(images, size, len(arrays)),
            input_ids=torch.from_numpy(np.concatenate(tokens)),
            position_ids=torch.from_numpy(np.concatenate(positions)),
            end=torch.from_numpy(np.concatenate(ends)),
            parent=torch.from_numpy(np.concatenate(parents)),
            paths=[torch.from_numpy(np.concatenate(runs)) for runs in runs_of],
            prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.long),
            multiplicities=torch.tensor(multiplicities, dtype=torch.long),
        )

    def unshared(self) -> TokenTree:
        """The same sequences side by side, nothing shared: what a packed trainer without prefix sharing computes.

        A sequence that counts for nothing (multiplicity 0: one that is listed again, to be scored from another token on)
        lies on the nodes of the one that it repeats.
        """
        counts = self.multiplicities.tolist()
        own: list[int] = []
        place: dict[int, int] = {}
        stretch_of: dict[tuple[int, ...], int] = {}
        for index in sorted(range(len(counts)), key=lambda index: counts[index] == 0):
            nodes_of = tuple(self.paths[index].tolist())
            if counts[index] or nodes_of not in stretch_of:
                stretch_of[nodes_of] = len(own)
                own.append(index)
            place[index] = stretch_of[nodes_of]
        lengths = torch.tensor([self.paths[index].numel() for index in own])
        starts = lengths.cumsum(0) - lengths
        nodes = torch.cat([self.paths[index] for index in own])
        start = starts.repeat_interleave(lengths)
        node = torch.arange(nodes.numel())
        stretches = node.split(lengths.tolist())
        images = self.images
        if images is not None:
            images = Images(
                [images.sets[images.set_of[index]] for index in own],
                [place[index] for index in range(len(counts))],
                {name: values[nodes] for name, values in images.token_inputs.items()},
            )
        return TokenTree(
            images=images,
            input_ids=self.input_ids[nodes],
            position_ids=node - start,
            end=start + lengths.repeat_interleave(lengths),
            parent=torch.where(node == start, -1, node - 1),
            paths=[stretches[place[index]] for index in range(len(counts))],
            prompt_lengths=self.prompt_lengths,
            multiplicities=self.multiplicities,
        )

    def __len__(self) -> int:
        """Number of nodes ``S``: the tokens that are computed."""
        return self.input_ids.numel()

    @property
    def num_sequences(self) -> int:
        return len(self.paths)

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens that the sequences hold when each is computed alone, as often as it counts."""
        return sum(path.numel() * count for path, count in zip(self.paths, self.multiplicities.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"TokenTree({self.num_sequences} sequences, {self.num_unshared_tokens} tokens in {len(self)} nodes)"


def _group_by_token(arrays: list[np.ndarray], members: Sequence[int], depth: int) -> list[list[int]]:
    """Split sequences by their token at ``depth``, groups in order of first appearance."""
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(int(arrays[member][depth]), []).append(member)
    return list(groups.values())


def _check_shared(arrays: list[np.ndarray], length: int) -> None:
    """Raise `ValueError` unless all sequences begin with the same ``length`` tokens, those of their images."""
    for index, array in enumerate(arrays):
        if len(array) < length:
            raise ValueError(f"sequence {index} has {len(array)} tokens: its images' tokens end at {length}")
        if _common_prefix(arrays[0], array, 0) < length:
            raise ValueError(f"sequence {index} differs from sequence 0 before token {length}, where their images end")


def _on_nodes(images: PromptImages, size: int, sequences: int) -> Images:
    """Images of all of a tree's sequences, whose tokens are its first nodes."""
    pad = torch.nn.functional.pad
    behind = size - images.length
    token_inputs = {name: pad(values, (0, behind)) for name, values in images.token_inputs.items()}
    return Images([images.inputs], [0] * sequences, token_inputs)
