"""Trees into rows of one fixed length, by best-fit-decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from preftree.images import Images
from preftree.transfer import is_on, send
from preftree.tree import TokenTree

# Lengths that rows have to a doubling: few where a kernel is compiled for each, which leaves a tenth of padding on average;
# many leave a hundredth.
FEW_LENGTHS = 4
MANY_LENGTHS = 32


@dataclass
class PackedRow:
    """Trees one behind the other in one row of ``S`` tokens, the rest padding.

    Indices (`end`, `parent`, `last_nodes`, `scored_nodes`) count from the row's start. A padding node sees only itself
    (``end = k + 1``, ``parent = -1``, position 0) and is scored by nobody; padding stands at the row's end.

    Attributes:
        input_ids: LongTensor ``[S]``.
        position_ids: LongTensor ``[S]``, positions in each token's own sequence.
        end: LongTensor ``[S]``; key ``k`` is visible to query ``q`` iff ``k <= q < end[k]``.
        parent: LongTensor ``[S]``; the token of node ``k`` is predicted at ``parent[k]``.
        sequence_ids: LongTensor ``[n]``, which sequences the row holds, counted over all packed trees in order.
        sequence_lengths: LongTensor ``[n]``, tokens of each sequence, prompt included.
        prompt_lengths: LongTensor ``[n]``, leading tokens that are not scored.
        last_nodes: LongTensor ``[n]``, the last token of each sequence.
        scored_nodes: LongTensor ``[T]``, the scored nodes of the first sequence, then of the second, ... A node that
            several sequences share is listed once in each.
        scored_lengths: LongTensor ``[n]``, how many of `scored_nodes` belong to each sequence.
        longest_scored: the largest of these, on the host.
        shortest_sequence, longest_sequence: of `sequence_lengths`, on the host; 0 without sequences.
        predicted_nodes: LongTensor ``[U]``, the scored nodes in order, each once: what the output head is needed for.
        scored_index: LongTensor ``[T]``, the places of `scored_nodes` in `predicted_nodes`.
        read_nodes: LongTensor ``[P]``, the nodes that these are predicted at (their parents) in order, each once.
        read_index: LongTensor ``[U]``, the places of the parents of `predicted_nodes` in `read_nodes`.
        node_counts: LongTensor ``[S]``, how many of the row's sequences hold the node, each as often as it counts
            (`TokenTree.multiplicities`); 0 for padding. A sum over nodes weighted by these is the sum over the tokens of
            all sequences.
        num_tokens: tokens that are not padding.
        runs: the row's unbranched runs in order, ``(start, stop, index of the run before it or -1)``; a tuple on the
            host, for backends that work run by run.
        images: of the row's sequences, or None.
        most_predicted: of `predicted_nodes` in the rows that ranks run at a time, the most (0: not known): where weights are
            shared out, all call the head as often.
        derived: what backends have made from the row (block lists, plans), kept for its next forward pass.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor
    parent: torch.Tensor
    sequence_ids: torch.Tensor
    sequence_lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    last_nodes: torch.Tensor
    scored_nodes: torch.Tensor
    scored_lengths: torch.Tensor
    longest_scored: int
    shortest_sequence: int
    longest_sequence: int
    predicted_nodes: torch.Tensor
    scored_index: torch.Tensor
    read_nodes: torch.Tensor
    read_index: torch.Tensor
    node_counts: torch.Tensor
    num_tokens: int
    runs: tuple[tuple[int, int, int], ...]
    images: Images | None = None
    most_predicted: int = 0
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        """Row length ``S``, padding included."""
        return self.input_ids.numel()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: what backends have made is made again."""
        return {**self.__dict__, "derived": {}}

    @property
    def num_sequences(self) -> int:
        return self.sequence_ids.numel()

    @property
    def completion_lengths(self) -> torch.Tensor:
        """LongTensor ``[n]``: tokens of each sequence behind its prompt."""
        return self.sequence_lengths - self.prompt_lengths

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens that the row's sequences hold when each is computed alone (reads a tensor back to the host)."""
        return int(self.node_counts.sum())

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The same row with its tensors on ``device``; the row itself if they are there.

        Args:
            non_blocking: makes no difference: a GPU is not waited for either way.
        """
        if is_on(self.device, device):
            return self
        return self.with_tensors(send(self.tensors, device))

    @property
    def _by_name(self) -> dict[str, torch.Tensor]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The row's tensors, its images' included."""
        return [*self._by_name.values(), *([] if self.images is None else self.images.tensors)]

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> PackedRow:
        """The same row with others in place of `tensors`, in their order."""
        given = iter(tensors)
        others: dict[str, Any] = {name: next(given) for name in self._by_name}
        images = None if self.images is None else self.images.with_tensors(given)
        return replace(self, **others, images=images, derived={})

    def path(self, sequence: int) -> torch.Tensor:
        """LongTensor ``[L]``: the nodes of one of the row's sequences (asks a GPU for their number)."""
        node, last = torch.arange(len(self), device=self.device), self.last_nodes[sequence]
        return ((node <= last) & (last < self.end)).nonzero().squeeze(1)

    def without_sequences(self) -> PackedRow:
        """The same tokens and images, of which nothing is scored."""
        kept = {"input_ids", "position_ids", "end", "parent"}
        none: dict[str, Any] = {name: tensor[:0] for name, tensor in self._by_name.items() if name not in kept}
        none["node_counts"] = torch.zeros_like(self.node_counts)
        images = self.images
        if images is not None:
            images = Images(images.sets, [], images.token_inputs)
        lengths: dict[str, Any] = {"longest_scored": 0, "shortest_sequence": 0, "longest_sequence": 0}
        return replace(self, **none, **lengths, images=images, derived={})

    def pin_memory(self) -> PackedRow:
        """The same row in page-locked memory (a `DataLoader` calls this with ``pin_memory=True``)."""
        return self.with_tensors(tensor.pin_memory() for tensor in self.tensors)

    def __repr__(self) -> str:
        saved = self.num_unshared_tokens / max(self.num_tokens, 1)
        return (
            f"PackedRow({len(self)} tokens, {self.num_tokens} used ({self.num_tokens / max(len(self), 1):.1%}), "
            f"{self.num_sequences} sequences, {int(self.scored_lengths.sum())} tokens scored, "
            f"{saved:.2f}x fewer than unshared, device={self.device})"
        )

    def draw(self, path: str | Path | None = None, max_size: int = 64) -> str:
        """The row's trees and mask as text, or as a picture.

        Args:
            path: where to write a PNG or SVG (needs matplotlib: the extra ``plot``). Without it nothing is written.
            max_size: larger masks are drawn in this many cells a side, a cell being marked if anything in it is visible.

        Returns:
            The drawing as text (the row's unbranched runs, indented below those that they continue; then the mask, ``#``
            visible), or the path written to.
        """
        from preftree.plot import draw_row

        return draw_row(self, path, max_size)


def pack(
    trees: Sequence[TokenTree], row_length: int | None = None, pad_token_id: int = 0, lengths: int | None = None
) -> list[PackedRow]:
    """Pack trees into rows of one fixed length by best-fit-decreasing. A tree is never split.

    Args:
        trees: the trees; their sequences are numbered over all of them, in order.
        row_length: ``S`` of every row; None packs everything into one row without padding.
        pad_token_id: token of the padding at the end of a row.
        lengths: None gives every row that length. Otherwise rows are no longer than their number allows, in `static_length`s
            of so many to a doubling: about equal, so that no short one is left over, which a GPU would idle for.

    Returns:
        The rows, those that hold the earliest trees first, but the emptiest one last; inside a row trees keep their
        order.

    Raises:
        ValueError: if there is no tree, or one is longer than ``row_length``.
    """
    if not trees:
        raise ValueError("nothing to pack: the list of trees is empty")
    sizes = [len(tree) for tree in trees]
    if row_length is None:
        row_length = sum(sizes)
    if row_length < 1:
        raise ValueError(f"row_length must be positive, got {row_length}")
    longest = max(range(len(trees)), key=sizes.__getitem__)
    if sizes[longest] > row_length:
        raise ValueError(
            f"tree {longest} has {sizes[longest]} tokens and does not fit into row_length={row_length}: "
            "raise row_length, or shorten the sequences (a tree is never split)"
        )
    first_sequence = [0]
    for tree in trees:
        first_sequence.append(first_sequence[-1] + tree.num_sequences)

    contents = _fill(sizes, row_length)
    if lengths is not None and len(contents) > 1:
        row_length, contents = _shortest(sizes, row_length, contents, lengths)
    rows = sorted(sorted(content) for content in contents)
    rows.append(rows.pop(min(range(len(rows)), key=lambda row: sum(sizes[tree] for tree in rows[row]))))
    row_lengths = [row_length] * len(rows)
    if lengths is not None:
        row_lengths[-1] = min(static_length(sum(sizes[tree] for tree in rows[-1]), lengths), row_length)
    return [
        _lay_out([trees[i] for i in content], [first_sequence[i] for i in content], length, pad_token_id)
        for content, length in zip(rows, row_lengths, strict=True)
    ]


def _fill(sizes: list[int], row_length: int) -> list[list[int]]:
    """What each row holds, by best-fit-decreasing."""
    contents: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        slot = bisect_left(free, (sizes[index], -1))
        if slot == len(free):
            contents.append([index])
            left, row = row_length - sizes[index], len(contents) - 1
        else:
            left, row = free.pop(slot)
            contents[row].append(index)
            left -= sizes[index]
        insort(free, (left, row))
    return contents


def _shortest(
    sizes: list[int], row_length: int, contents: list[list[int]], lengths: int
) -> tuple[int, list[list[int]]]:
    """A row length that takes no more rows than the given one, as short as bisection finds it, and what rows hold then."""
    candidates = [static_length(max(max(sizes), -(-sum(sizes) // len(contents))), lengths)]
    while candidates[-1] < row_length:
        candidates.append(static_length(candidates[-1] + 1, lengths))
    candidates[-1] = row_length
    first, last = 0, len(candidates) - 1
    while first < last:
        middle = (first + last) // 2
        found = _fill(sizes, candidates[middle])
        if len(found) <= len(contents):
            last, contents = middle, found
        else:
            first = middle + 1
    return candidates[last], contents


def static_length(tokens: int, lengths: int = FEW_LENGTHS, block: int = 128) -> int:
    """The shortest of a few fixed row lengths that holds ``tokens``: kernels compiled for one are used again.

    Lengths are ``block`` times 1, 2, 3, ... up to twice ``lengths`` (a power of two), and from there on ``lengths`` of them to
    each doubling.
    """
    blocks = max(-(-tokens // block), 1)
    step = 1 << max(blocks.bit_length() - lengths.bit_length(), 0)
    return -(-blocks // step) * step * block


def empty_row(row_length: int, pad_token_id: int = 0) -> PackedRow:
    """A row of nothing but padding: it holds no sequence and adds nothing to a loss."""
    return _lay_out([], [], row_length, pad_token_id)


def _lay_out(trees: list[TokenTree], first_sequence: list[int], row_length: int, pad_token_id: int) -> PackedRow:
    node = torch.arange(row_length)
    input_ids = torch.full((row_length,), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros(row_length, dtype=torch.long)
    end = node + 1
    parent = torch.full((row_length,), -1, dtype=torch.long)
    node_counts = torch.zeros(row_length, dtype=torch.long)
    sequence_ids: list[int] = []
    sequence_lengths: list[int] = []
    prompt_lengths: list[int] = []
    last_nodes: list[int] = []
    scored: list[torch.Tensor] = []
    start = 0
    for tree, first in zip(trees, first_sequence, strict=True):
        here = slice(start, start + len(tree))
        input_ids[here] = tree.input_ids
        position_ids[here] = tree.position_ids
        end[here] = tree.end + start
        parent[here] = torch.where(tree.parent < 0, tree.parent, tree.parent + start)
        sequence_ids.extend(range(first, first + tree.num_sequences))
        prompts = tree.prompt_lengths.tolist()
        prompt_lengths.extend(prompts)
        for path, prompt, count in zip(tree.paths, prompts, tree.multiplicities.tolist(), strict=True):
            sequence_lengths.append(path.numel())
            node_counts[path + start] += count
            last_nodes.append(int(path[-1]) + start)
            # The first token of a sequence has no parent, hence no prediction: it is scored by nobody.
            scored.append(path[max(prompt, 1) :] + start)
        start += len(tree)
    scored_nodes = torch.cat(scored) if scored else torch.zeros(0, dtype=torch.long)
    predicted_nodes, scored_index = scored_nodes.unique(return_inverse=True)
    read_nodes, read_index = parent[predicted_nodes].unique(return_inverse=True)
    return PackedRow(
        input_ids=input_ids,
        position_ids=position_ids,
        end=end,
        parent=parent,
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.long),
        sequence_lengths=torch.tensor(sequence_lengths, dtype=torch.long),
        prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.long),
        last_nodes=torch.tensor(last_nodes, dtype=torch.long),
        scored_nodes=scored_nodes,
        scored_lengths=torch.tensor([nodes.numel() for nodes in scored], dtype=torch.long),
        longest_scored=max((nodes.numel() for nodes in scored), default=0),
        shortest_sequence=min(sequence_lengths, default=0),
        longest_sequence=max(sequence_lengths, default=0),
        predicted_nodes=predicted_nodes,
        scored_index=scored_index,
        read_nodes=read_nodes,
        read_index=read_index,
        node_counts=node_counts,
        num_tokens=start,
        images=_images_of(trees, row_length),
        runs=_runs(end[:start], parent[:start]),
    )


def _images_of(trees: list[TokenTree], row_length: int) -> Images | None:
    """The images of trees that stand one behind the other in a row."""
    images = Images([], [], {})
    start = 0
    for tree in trees:
        own = tree.images or Images([], [-1] * tree.num_sequences, {})
        images.set_of += [place + len(images.sets) if place >= 0 else -1 for place in own.set_of]
        images.sets += own.sets
        for name, values in own.token_inputs.items():
            whole = images.token_inputs.setdefault(name, torch.zeros(row_length, dtype=torch.long))
            whole[start : start + len(tree)] = values
        start += len(tree)
    return images if images.sets else None


def _runs(end: torch.Tensor, parent: torch.Tensor) -> tuple[tuple[int, int, int], ...]:
    """Unbranched runs ``(start, stop, run before it or -1)``: a run ends at a leaf or where the tree branches."""
    if not end.numel():
        return ()
    node = torch.arange(end.numel())
    # A node continues the run before it if that node is its parent and has no other child: same subtree end.
    begins = torch.ones(end.numel(), dtype=torch.bool)
    begins[1:] = (parent[1:] != node[:-1]) | (end[1:] != end[:-1])
    starts = node[begins]
    stops = torch.cat((starts[1:], torch.tensor([end.numel()])))
    run_of = begins.long().cumsum(0) - 1
    parents = parent[starts]
    before = torch.where(parents < 0, parents, run_of[parents.clamp(min=0)])
    return tuple(zip(starts.tolist(), stops.tolist(), before.tolist(), strict=True))
