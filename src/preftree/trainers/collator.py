"""Tokenised pairs to packed rows: what a worker process prepares for a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from preftree.packing import pack, static_length
from preftree.tree import TokenTree

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def truncate(
    prompt: Sequence[int], completion: Sequence[int], max_length: int | None, mode: str
) -> tuple[list[int], int]:
    """One sequence, cut to ``max_length`` tokens as TRL cuts it, and how many of its tokens belong to the prompt.

    Args:
        mode: "keep_start" cuts the completion's end, "keep_end" the prompt's beginning.
    """
    sequence = [*prompt, *completion]
    surplus = 0 if max_length is None else max(len(sequence) - max_length, 0)
    if mode == "keep_start":
        return sequence[: len(sequence) - surplus], min(len(prompt), len(sequence) - surplus)
    if mode == "keep_end":
        return sequence[surplus:], max(len(prompt) - surplus, 0)
    raise ValueError(f"unknown truncation_mode {mode!r}: choose 'keep_start' or 'keep_end'")


def pair_tree(example: Mapping[str, Any], max_length: int | None, mode: str) -> TokenTree:
    """The tree of a tokenised pair (`prompt_ids`, `chosen_ids`, `rejected_ids`): sequence 0 chosen, 1 rejected."""
    sides = [
        truncate(example["prompt_ids"], example[side], max_length, mode) for side in ("chosen_ids", "rejected_ids")
    ]
    return TokenTree.from_sequences([ids for ids, _ in sides], [length for _, length in sides])


@dataclass
class TreeCollator:
    """Collates tokenised pairs into packed rows.

    Args:
        pad_token_id: token of the rows' padding.
        max_length, truncation_mode: longer sequences are cut as TRL's collator cuts them.
        row_length: tokens of a row; None puts the batch into one row.
        static: round a row without a given length up to one of a few lengths, for compiled kernels.
        share_prefixes: False lays every sequence out by itself (packed, but nothing shared): the baseline.
        padded: a collator of TRL's format whose batch to add under "padded", for what needs logits of whole sequences.

    A batch holds ``rows`` (sequence ``2 i`` is pair ``i``'s chosen one, ``2 i + 1`` its rejected one), ``index``
    (LongTensor ``[pairs]``), ``num_tokens`` (of all sequences, the prompt counted in each), ``chosen_tokens`` (scored ones
    of the chosen completions), and the reference's log-probabilities ``ref_chosen_logps``, ``ref_rejected_logps`` (fp32
    ``[pairs]``) where the data has them.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    row_length: int | None = None
    static: bool = False
    share_prefixes: bool = True
    padded: Any = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self._batch([pair_tree(example, self.max_length, self.truncation_mode) for example in examples])
        for column in REFERENCE_COLUMNS:
            if column in examples[0]:
                batch[column] = torch.tensor([example[column] for example in examples], dtype=torch.float32)
        if self.padded is not None:
            batch["padded"] = self.padded(list(examples))
        return batch

    def _batch(self, trees: list[TokenTree]) -> dict[str, Any]:
        """Rows of the trees of a batch; a pair is never split over two rows."""
        chosen_tokens = sum(tree.paths[0].numel() - max(int(tree.prompt_lengths[0]), 1) for tree in trees)
        batch = {
            "index": torch.arange(len(trees)),
            "num_tokens": sum(tree.num_unshared_tokens for tree in trees),
            "chosen_tokens": chosen_tokens,
        }
        if not self.share_prefixes:
            trees = [tree.unshared() for tree in trees]
        row_length = self.row_length
        if row_length is None and self.static:
            row_length = static_length(sum(len(tree) for tree in trees))
        return batch | {"rows": pack(trees, row_length, self.pad_token_id)}

    def from_padded(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The same batch from TRL's padded format: rows [all chosen; all rejected], masks, already truncated."""
        sequences, prompts = [], []
        for ids, attended, completion in zip(
            batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool(), batch["completion_mask"].cpu(), strict=True
        ):
            sequences.append(ids[attended])
            prompts.append(int(attended.sum()) - int(completion[attended].sum()))
        half = len(sequences) // 2
        trees = [
            TokenTree.from_sequences([sequences[i], sequences[half + i]], [prompts[i], prompts[half + i]])
            for i in range(half)
        ]
        result = self._batch(trees)
        result.update({column: batch[column] for column in REFERENCE_COLUMNS if column in batch})
        if self.padded is not None:
            result["padded"] = batch
        return result
