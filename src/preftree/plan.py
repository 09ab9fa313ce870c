"""What sharing prefixes saves on given data, before anything is trained."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from preftree.attention import BACKENDS, Layer, choose_backend, cost
from preftree.attention.mask import CAUSAL, Rule, chunks, sliding_window
from preftree.models.refusals import other_layer_types, other_layers, read_by_index
from preftree.packing import MANY_LENGTHS, PackedRow, pack, static_length
from preftree.tree import TokenTree


@dataclass(frozen=True)
class ModelCost:
    """Forward operations of a decoder: per computed token, per scored token (the head), per visible query-key pair.

    ``along_paths`` says why parts of its layers run along paths, if it is known that they do: less is saved then.
    """

    per_token: float
    per_scored: float
    per_pair: float
    along_paths: str | None = None

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelCost:
        """Counted on the model's shape, without weights. A mixture of experts counts its active experts only.

        All of it counts as shared, also what runs along paths.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        head = model.get_output_embeddings().weight.numel()
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        embedding = {id(parameter) for table in tables for parameter in table.parameters()}
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        active = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1.0
        body = sum(
            parameter.numel() * (active if ".experts." in name else 1.0)
            for name, parameter in model.named_parameters()
            if id(parameter) not in embedding
        )
        heads = getattr(text, "num_attention_heads", None) or 0  # none in a recurrent model
        head_size = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
        layers = text.num_hidden_layers - len(other_layers(config))
        along_paths = other_layer_types(config) or read_by_index(model)
        return cls(2 * body, 2 * head, 4 * heads * head_size * layers, along_paths)

    def of_prompts(self, prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Of trees that share their prompts alone, ``[n]``, by tokens of prompts ``[n]`` and of responses ``[n, k]``."""
        visible = prompts**2 / 2 + (responses * prompts[:, None] + responses**2 / 2).sum(1)
        scored = responses.sum(1)
        return self.per_token * (prompts + scored) + self.per_pair * visible + self.per_scored * scored


class Trees(Protocol):
    """Trees by number, made as they are asked for or lying in a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: slice, /) -> Sequence[TokenTree]: ...


class TreesOf:
    """Trees of a tokenised data set, made anew whenever they are asked for.

    Args:
        dataset: gives examples by number.
        tree_of: makes an example's tree.
    """

    def __init__(self, dataset: Any, tree_of: Callable[[Any], TokenTree]) -> None:
        self._dataset, self._tree_of = dataset, tree_of

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, numbers: slice) -> list[TokenTree]:
        columns = self._dataset[numbers]
        return [
            self._tree_of(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
        ]


@dataclass(frozen=True)
class Plan:
    """Counts over all pairs (or ranked examples) of a data set, and what they promise.

    Attributes:
        pairs: how many.
        unshared_tokens: tokens of all sequences, each by itself.
        padded_tokens: the same in padded batches, every row as long as its batch's longest, in the data's order.
        shared_tokens: tokens with prefixes computed once.
        row_length: tokens of a row, as given or as suggested.
        row_tokens: tokens of all rows, padding included.
        rows_per_step: mean number of rows of a micro-batch.
        speedup: expected ratio of computation, packed but unshared over shared (None without the model's shape).
        speedup_padded: the same for padded batches over shared rows.
        prompts, responses, trees: lengths in tokens.
    """

    pairs: int
    unshared_tokens: int
    padded_tokens: int
    shared_tokens: int
    row_length: int
    suggested: bool
    row_tokens: int
    rows_per_step: float
    speedup: float | None
    speedup_padded: float | None
    prompts: Sequence[int]
    responses: Sequence[int]
    trees: Sequence[int]

    @property
    def saving(self) -> float:
        """Tokens without sharing over tokens with it."""
        return self.unshared_tokens / self.shared_tokens

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return self.shared_tokens / self.row_tokens


def make_plan(trees: Trees, batch_size: int, row_length: int | None = None, cost: ModelCost | None = None) -> Plan:
    """Plan for pairs as trees, ``batch_size`` pairs to a micro-batch, in their order; only these are held at a time.

    Raises:
        ValueError: if there is no tree, or one does not fit into ``row_length``.
    """
    if not len(trees):
        raise ValueError("there is no pair to plan for")
    suggested = row_length is None
    if row_length is None:
        row_length = _suggest(trees, batch_size)
    rows = row_tokens = padded = unshared = shared_tokens = 0
    scored = shared = alone = full = 0.0
    prompts, responses, sizes = (array("i") for _ in range(3))
    count_cost = cost or ModelCost(0.0, 0.0, 0.0)
    for first in range(0, len(trees), batch_size):
        batch = trees[first : first + batch_size]
        packed = pack(batch, row_length, lengths=MANY_LENGTHS)
        rows += len(packed)
        row_tokens += sum(len(row) for row in packed)
        longest = count = 0
        for tree in batch:
            lengths = [path.numel() for path in tree.paths]
            own = tree.prompt_lengths.tolist()
            # Responses as often as they stand in a pair: that is what pairs listed one by one compute.
            times = tree.multiplicities.tolist()
            longest, count = max(longest, *lengths), count + sum(times)
            unshared += tree.num_unshared_tokens
            shared_tokens += len(tree)
            scored += sum(length - max(prompt, 1) for length, prompt in zip(lengths, own, strict=True))
            shared += len(tree) * count_cost.per_token + _visible_pairs(tree) * count_cost.per_pair
            alone += sum(n * _of_sequence(length, count_cost) for n, length in zip(times, lengths, strict=True))
            prompts.append(own[0])
            responses.extend(length - prompt for length, prompt in zip(lengths, own, strict=True))
            sizes.append(len(tree))
        padded += count * longest
        full += count * _of_sequence(longest, count_cost)
    scored *= count_cost.per_scored
    return Plan(
        pairs=len(trees),
        unshared_tokens=unshared,
        padded_tokens=padded,
        shared_tokens=shared_tokens,
        row_length=row_length,
        suggested=suggested,
        row_tokens=row_tokens,
        rows_per_step=rows / -(-len(trees) // batch_size),
        speedup=None if cost is None else (scored + alone) / (scored + shared),
        speedup_padded=None if cost is None else (scored + full) / (scored + shared),
        prompts=prompts,
        responses=responses,
        trees=sizes,
    )


def _of_sequence(length: int, cost: ModelCost) -> float:
    """Operations of a sequence by itself, the head's left out."""
    return length * cost.per_token + length * (length + 1) / 2 * cost.per_pair


def attention_layers(config: PreTrainedConfig, device: torch.device) -> dict[str, Layer]:
    """The kinds of attention layers that a model's config describes, in bfloat16 on ``device``.

    A config says nothing of what only the model's code knows (caps, sinks, biases): in training each layer is asked.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return {}
    nope, rope = (getattr(text, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    size = nope + rope if nope and rope else getattr(text, "head_dim", None) or text.hidden_size // heads
    value_size = getattr(text, "v_head_dim", None) or size
    groups = heads if nope and rope else getattr(text, "num_key_value_heads", None) or heads
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    rules: dict[str, Rule] = {"full_attention": CAUSAL}
    if window:
        rules["sliding_attention"] = sliding_window(window)
    if chunk:
        rules["chunked_attention"] = chunks(chunk)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        windowed = window and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if windowed else "full_attention"]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        kind: Layer(device.type, capability, torch.bfloat16, heads, groups, size, value_size, rules[kind])
        for kind in dict.fromkeys(kinds)
        if kind in rules
    }


def attention_choices(config: PreTrainedConfig, rows: Sequence[PackedRow], device: torch.device) -> dict[str, str]:
    """What "auto" chooses for a model's layers on rows, and what the cost model expects of each backend.

    Where ``device`` is no GPU, the cost model says what an H100 with flash-attn-4 would be given; it needs none to say so.

    Returns:
        A text for each kind of layer.
    """
    texts = {}
    for kind, layer in attention_layers(config, device).items():
        chosen = [choose_backend("auto", layer, row) for row in rows]
        text = ", ".join(f"{name} in {chosen.count(name) / len(rows):.0%} of rows" for name in dict.fromkeys(chosen))
        elsewhere = "" if layer.device == "cuda" else " on an H100"
        gpu = replace(layer, device="cuda", capability=layer.capability or (9, 0))
        work = [cost.Work.of(row, layer.rule.window) for row in rows]
        means = {}
        for name in BACKENDS:
            estimates = [estimate for w in work if (estimate := cost.estimate(name, gpu, w)) is not None]
            if estimates:
                means[name] = sum(estimates) / len(estimates)
        if means:
            listed = ", ".join(f"{name} {time:.2f}" for name, time in sorted(means.items(), key=lambda item: item[1]))
            text += f"; expected ms a row and layer{elsewhere}: {listed}"
        texts[kind] = text
    return texts


def _visible_pairs(tree: TokenTree) -> int:
    """Query-key pairs that attention computes: every node sees the nodes on its path."""
    return int((tree.position_ids + 1).sum())


def _suggest(trees: Trees, batch_size: int, most: int = 65536) -> int:
    """The static length whose rows hold the batches in the fewest tokens; among equals the shortest."""
    longest = largest = 0
    starts = range(0, len(trees), batch_size)
    for first in starts:
        sizes = [len(tree) for tree in trees[first : first + batch_size]]
        longest, largest = max(longest, *sizes), max(largest, sum(sizes))
    candidates = [static_length(longest)]
    while candidates[-1] < min(largest, most):
        candidates.append(static_length(candidates[-1] + 1))
    sample = [trees[first : first + batch_size] for first in starts[:: max(len(starts) // 32, 1)]]

    def tokens(length: int) -> int:
        return sum(len(row) for batch in sample for row in pack(batch, length, lengths=MANY_LENGTHS))

    return min(candidates, key=lambda length: (tokens(length), length))


def describe(plan: Plan) -> list[tuple[str, str]]:
    """The plan as (what, figure) lines."""

    def spread(values: Sequence[int]) -> str:
        ordered = sorted(values)
        at = [ordered[int(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95)]
        return f"{at[1]} (5 %: {at[0]}, 95 %: {at[2]}, longest: {ordered[-1]})"

    lines = [
        ("examples", f"{plan.pairs:,}"),
        ("tokens in padded batches", f"{plan.padded_tokens:,}"),
        ("tokens without sharing", f"{plan.unshared_tokens:,}"),
        ("tokens with sharing", f"{plan.shared_tokens:,} ({plan.saving:.2f}x fewer than without)"),
        ("median prompt", spread(plan.prompts)),
        ("median response", spread(plan.responses)),
        ("median pair, shared", spread(plan.trees)),
        ("row_length" + (" (suggested)" if plan.suggested else ""), f"{plan.row_length:,}"),
        ("rows a micro-batch", f"{plan.rows_per_step:.2f}, {plan.fill:.1%} full"),
    ]
    if plan.speedup is not None and plan.speedup_padded is not None:
        lines.append(
            ("expected speed-up", f"{plan.speedup:.2f}x over packing alone, {plan.speedup_padded:.2f}x over padding")
        )
    return lines
