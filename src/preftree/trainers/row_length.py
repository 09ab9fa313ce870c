"""`row_length="auto"`: the longest row whose forward and backward pass fit into a GPU's free memory, found by running some."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from preftree.logprobs import sequence_logps
from preftree.models import prepared_part
from preftree.models.rotary import RotaryLimit
from preftree.packing import PackedRow, pack, static_length
from preftree.tree import TokenTree

logger = logging.get_logger(__name__)

# Rows grow no longer than this: by then what a step pays for each row is lost among its tokens.
MOST_TOKENS = 1 << 16
# Of the free memory; the rest is for fragments, and for rows that score more of their tokens than those tried.
_SHARE = 0.9
# What an optimizer keeps of a parameter if it cannot be tried on another one: two float32 numbers.
_USUAL_STATE = 8
_TRIED_ELEMENTS = 1 << 16


def fitting_length(peak_of: Callable[[int], int], free: int, start: int = 2048, most: int = MOST_TOKENS) -> int:
    """The longest `static_length` up to ``most`` whose peak is at most ``free``.

    Memory grows along a line, so each length tried says how far the next may go; no length is tried that is expected not to
    fit, unless the first one does not.

    Args:
        peak_of: bytes that a step takes at its peak with a row of so many tokens.
        start: tokens to begin with.

    Raises:
        ValueError: if not even the shortest row fits.
    """
    lengths = sorted({static_length(tokens) for tokens in range(128, most + 1, 128)})
    lengths = lengths[: bisect_right(lengths, most)]
    tried: dict[int, int] = {}

    def longest_up_to(tokens: float) -> int:
        return max((length for length in lengths if length <= tokens), default=lengths[0])

    def expected(length: int) -> float:
        """By the line through the two longest lengths tried (with one alone, as if nothing stayed)."""
        known = sorted(tried)[-2:]
        slope = tried[known[-1]] / known[-1]
        if len(known) == 2:
            slope = (tried[known[1]] - tried[known[0]]) / (known[1] - known[0])
        return tried[known[-1]] + slope * (length - known[-1])

    length = longest_up_to(start)
    while True:
        tried[length] = peak_of(length)
        fitting = [known for known, peak in tried.items() if peak <= free]
        if not fitting:
            if length == lengths[0]:
                raise ValueError(
                    f"row_length='auto': a row of {length} tokens takes {tried[length] / 1e9:.2f} GB, {free / 1e9:.2f} GB "
                    "are free. Switch activation checkpointing on, load the models in half precision, or train adapters"
                )
            length = longest_up_to(min(length - 1, length * free / tried[length]))
            continue
        best = max(fitting)
        if len(tried) == 1 and best > lengths[0]:
            # A second point says what memory does not grow with the row.
            length = longest_up_to(best // 2)
            continue
        too_long = min((known for known, peak in tried.items() if peak > free), default=most + 1)
        further = [
            other for other in lengths if best < other < too_long and other <= 4 * best and expected(other) <= free
        ]
        if not further:
            return best
        length = further[-1]


def pending_optimizer_bytes(optimizer: Any) -> int:
    """Bytes that an optimizer will keep of its parameters once it steps, and has not yet."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if optimizer is None or optimizer.state:
        return 0
    total = 0.0
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        per_element: dict[tuple[torch.dtype, bool], float] = {}
        for parameter in group["params"]:
            kind = (parameter.dtype, parameter.ndim > 1)
            if kind not in per_element:
                per_element[kind] = _state_per_element(type(optimizer), options, parameter)
            total += parameter.numel() * per_element[kind]
    return int(total)


def _state_per_element(kind: Any, options: dict[str, Any], parameter: torch.Tensor) -> float:
    shape = (_TRIED_ELEMENTS,) if parameter.ndim < 2 else (_TRIED_ELEMENTS // 256, 256)
    twin = torch.nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    twin.grad = torch.zeros_like(twin)
    try:
        optimizer = kind([{**options, "params": [twin]}])
        optimizer.step()
    except Exception:  # an optimizer that wants to know more of its model
        return _USUAL_STATE
    kept = [value for value in optimizer.state[twin].values() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / _TRIED_ELEMENTS


def free_bytes(device: torch.device) -> int:
    """What a GPU has left for tensors, the allocator's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _row(length: int, vocabulary: int, limit: RotaryLimit | None) -> PackedRow:
    """A pair of random tokens that fills a row, three quarters of it prompt; several where sequences may not be so long."""
    generator = torch.Generator().manual_seed(length)

    def draw(size: int) -> list[int]:
        return torch.randint(0, vocabulary, (size,), generator=generator).tolist()

    count = 1 if limit is None or limit.may_be_longer else -(-length // limit.tokens)
    trees = []
    for _ in range(count):
        prompt = draw(length // count * 3 // 4)
        # The first tokens differ: nothing but the prompt is shared.
        pair = [prompt + [first] + draw(length // count // 8 - 1) for first in (0, 1)]
        trees.append(TokenTree.from_sequences(pair, [len(prompt)] * 2))
    return pack(trees, length)[0]


def peak_bytes(trainer: Any, length: int) -> int:
    """What the policy's forward and backward pass take at their peak with a row of so many tokens; no gradient is left."""
    model, device = trainer.model_wrapped, trainer.args.device
    prepared = prepared_part(model)
    if prepared is None:
        raise TypeError(f"{type(model).__name__} hides the model that it wraps: give row_length as a number")
    row = _row(length, prepared.vocabulary_size, prepared.rotary_limit)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with trainer.accelerator.no_sync(model), trainer.compute_loss_context_manager():
            loss = sequence_logps(model, row, statistics=True).logps.sum()
            trainer.accelerator.backward(0 * loss)
        return torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        return torch.cuda.mem_get_info(device)[1]
    finally:
        model.zero_grad(set_to_none=True)


class FitRows(TrainerCallback):
    """Finds the row length when training begins: the models are on their device then, and the optimizer is known."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        trainer = self.trainer
        free = int(_SHARE * free_bytes(args.device)) - pending_optimizer_bytes(optimizer)
        was_training = trainer.model.training
        trainer.model.train()
        try:
            length = fitting_length(lambda tokens: peak_bytes(trainer, tokens), free)
        finally:
            trainer.model.train(was_training)
        length = int(trainer.exchange.gather([length]).min())
        logger.info(f"row_length='auto': rows of {length} tokens fit into {free / 1e9:.1f} GB")
        trainer.use_rows_of(length)
