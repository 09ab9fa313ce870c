"""Log-probabilities of sequences from a row of trees: the head runs at scored parents only, in chunks.

The log-probability of a node is ``log p(token[node] | hidden[parent[node]])``: the first token of each response is
scored from the last token it shares with the others. A node that several sequences share is computed once and counted
in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from preftree.models import PreparedModel, ready_to_run
from preftree.packing import PackedRow
from preftree.token_scores import token_scores

# Logits of one chunk hold at most this many numbers (256 MiB in float32); on a GPU they take at most this share of its
# memory. Few chunks are better than many: each adds its gradient to the whole head's.
LOGITS_PER_CHUNK = 1 << 26
_SHARE_OF_A_GPU = 1 / 32


@dataclass
class SequenceLogps(ModelOutput):
    """Log-probabilities of a row's sequences. ``n`` sequences, ``T`` scored tokens of all of them.

    Attributes:
        logps: fp32 ``[n]``, natural-log probabilities summed over each sequence's scored tokens.
        lengths: LongTensor ``[n]``, how many tokens each sum is over. (A sequence's very first token has no prediction:
            with prompt length 0 this is one less than the sequence's length.)
        longest: the largest of these, on the host.
        token_logps: fp32 ``[T]``, the first sequence's scored tokens, then the second's, ...: `PackedRow.scored_nodes`.
        entropy: fp32 ``[T]``, entropy of the predicted distribution in nats, no gradient. Like the two below, only with
            ``statistics=True``.
        mean_logits: fp32 ``[T]``, mean of the logits over the vocabulary, no gradient.
        is_top1: bool ``[T]``, whether the token is the most probable one (the lowest id wins a tie).
        log_sum_sq_probs: fp32 ``[T]``, ``log sum_v p_v^2``, no gradient.
        expert_counts: fp32 ``[E]``, of a mixture of experts, with ``experts=True``: how often its layers' routers chose
            each expert, summed over layers and over all tokens of all sequences, prompts counted in each. No gradient.
        expert_probs: fp32 ``[E]``, sums of the routers' probabilities over the same tokens.
    """

    logps: torch.Tensor
    lengths: torch.Tensor | None = None
    longest: int | None = None
    token_logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    expert_counts: torch.Tensor | None = None
    expert_probs: torch.Tensor | None = None


def sequence_logps(
    model: torch.nn.Module, row: PackedRow, statistics: bool = False, experts: bool = False
) -> SequenceLogps:
    """Log-probabilities of every sequence of a row, each as the stock model on the sequence alone gives it.

    Args:
        model: a model from `preftree.prepare_model`, also when PEFT, DDP or accelerate has wrapped it since. (A model
            that is not prepared is prepared here, with the automatic backend.)
        row: a row of `preftree.pack`; it is moved to the model's device.
        statistics: also give entropy, mean logits, top-1 hits and the sum of squared probabilities of each token.
        experts: also give the load of a mixture of experts, for its auxiliary loss.

    Raises:
        NotImplementedError: if the model cannot share prefixes exactly.
        ValueError: for token ids outside the model's vocabulary, and for a sequence classifier.
    """
    prepared, row = ready_to_run(model, row)
    if prepared.classifies:
        raise ValueError(
            f"{type(prepared.model).__name__} has no output head over the vocabulary: sequence_rewards gives its scores"
        )
    return model(on_tree=lambda prepared: _score_row(prepared, row, statistics, experts))


def _score_row(prepared: PreparedModel, row: PackedRow, statistics: bool, experts: bool) -> SequenceLogps:
    # Each scored node once, however many sequences share it. Nothing here asks the device for a size: it would wait.
    nodes = row.predicted_nodes
    options: dict[str, Any] = {"output_router_logits": True} if experts else {}
    output = prepared.run(row, wanted=row.read_nodes, **options)
    hidden_PH = output.last_hidden_state.squeeze(0)
    scores = _score_nodes(prepared, hidden_PH[row.read_index], row.input_ids[nodes], statistics, row.most_predicted)
    if not nodes.numel():
        # Keeps every parameter in the graph, so that a rank without sequences takes part in collectives.
        scores["token_logps"] = scores["token_logps"] + hidden_PH.sum() * 0
    per_token = {name: value[row.scored_index] for name, value in scores.items()}
    load = {}
    if experts:
        load = _expert_load(prepared.router_logits(output), row.node_counts, prepared.experts_per_token)
    return SequenceLogps(
        logps=sum_by_sequence(per_token["token_logps"], row.scored_lengths, row.longest_scored),
        lengths=row.scored_lengths,
        longest=row.longest_scored,
        **per_token,
        **load,
    )


def _expert_load(
    router_logits: tuple[torch.Tensor, ...], node_counts: torch.Tensor, chosen: int
) -> dict[str, torch.Tensor]:
    """How often each expert is chosen, and the sum of its probabilities, over layers and the tokens of all sequences."""
    weight_S = node_counts.float()
    counts = weight_S.new_zeros(router_logits[0].shape[-1])
    probs = counts
    for logits_SE in router_logits:
        p_SE = logits_SE.view(len(weight_S), -1).softmax(-1)
        choice_SK = p_SE.topk(chosen, dim=-1).indices
        counts = counts.index_add(0, choice_SK.flatten(), weight_S.repeat_interleave(chosen))
        probs = probs + (weight_S[:, None] * p_SE.float()).sum(0)
    return {"expert_counts": counts, "expert_probs": probs}


def sum_by_sequence(values: torch.Tensor, lengths: torch.Tensor, longest: int | None = None) -> torch.Tensor:
    """Sums of consecutive stretches: ``values [T]``, ``lengths [n]`` with sum T, gives ``[n]``; differentiable.

    Args:
        longest: the largest length, which the device has to be asked for otherwise.
    """
    if longest is None:
        longest = int(lengths.max()) if lengths.numel() else 0
    count, total = lengths.numel(), values.numel()
    # Rows of a table, zeros behind each: sums of rows add up in an order that keeps digits.
    sequence = torch.arange(count, device=lengths.device).repeat_interleave(lengths, output_size=total)
    column = torch.arange(total, device=lengths.device) - (lengths.cumsum(0) - lengths)[sequence]
    table = values.new_zeros(count * longest).scatter(0, sequence * longest + column, values)
    return table.view(count, longest).sum(1)


def _score_nodes(
    prepared: PreparedModel, hidden_NH: torch.Tensor, targets_N: torch.Tensor, statistics: bool, most: int
) -> dict[str, torch.Tensor]:
    """Of the targets; the head is called as often as for ``most`` of them, if these are more."""
    size = _chunk_size(hidden_NH, prepared.vocabulary_size)

    def score(hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return token_scores(prepared.logits(hidden), targets, statistics)

    most = max(most, len(targets_N))
    if most <= size:
        return score(hidden_NH, targets_N)
    # Logits of a first chunk are kept for the backward pass. The others' are computed there again, in halves: these and
    # their gradient take as much as the kept ones' gradient will.
    half = -(-size // 2)
    rest = [(hidden_NH[first : first + half], targets_N[first : first + half]) for first in range(size, most, half)]
    again = partial(checkpoint, score, use_reentrant=False) if torch.is_grad_enabled() else score
    chunks = [score(hidden_NH[:size], targets_N[:size]), *(again(*part) for part in rest)]
    prepared.end_logits()
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _chunk_size(hidden_NH: torch.Tensor, vocabulary_size: int) -> int:
    """Tokens of a chunk."""
    numbers = LOGITS_PER_CHUNK
    if hidden_NH.is_cuda:
        memory = torch.cuda.get_device_properties(hidden_NH.device).total_memory
        numbers = int(_SHARE_OF_A_GPU * memory) // hidden_NH.element_size()
    return max(1, numbers // vocabulary_size)
