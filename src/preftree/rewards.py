"""Rewards of sequences from a row of trees: a sequence classifier's score at each sequence's last token."""

from __future__ import annotations

import torch

from preftree.models import PreparedModel, ready_to_run
from preftree.packing import PackedRow


def sequence_rewards(model: torch.nn.Module, row: PackedRow) -> torch.Tensor:
    """Score of every sequence of a row, each as the stock sequence classifier on the sequence alone gives it.

    As there, it is read at the last token that is not ``config.pad_token_id`` (at the first token, if all are).

    Args:
        model: a ``...ForSequenceClassification`` with one label, from `preftree.prepare_model`, also when PEFT, DDP or
            accelerate has wrapped it since. (A model that is not prepared is prepared here.)
        row: a row of `preftree.pack`; it is moved to the model's device.

    Returns:
        fp32 ``[n]``.

    Raises:
        NotImplementedError: if the model cannot share prefixes exactly.
        ValueError: if it has no score head of one label, and for token ids outside the model's vocabulary.
    """
    prepared, row = ready_to_run(model, row)
    if not (prepared.classifies and prepared.model.config.num_labels == 1):
        raise ValueError(
            f"{type(prepared.model).__name__} gives no rewards: load the model with "
            "AutoModelForSequenceClassification and num_labels=1"
        )
    return model(on_tree=lambda prepared: _rewards(prepared, row))


def _rewards(prepared: PreparedModel, row: PackedRow) -> torch.Tensor:
    hidden_SH = prepared.hidden_states(row)
    nodes = _last_tokens(row, prepared.model.config.get_text_config().pad_token_id)
    rewards = prepared.scores(hidden_SH[nodes])[:, 0].float()
    # Keeps every parameter in the graph, so that a rank without sequences takes part in collectives.
    return rewards if nodes.numel() else rewards + prepared.scores(hidden_SH).sum() * 0


def _last_tokens(row: PackedRow, pad_token_id: int | None) -> torch.Tensor:
    """Nodes ``[n]`` of each sequence's last token that is not padding."""
    nodes = row.last_nodes
    if pad_token_id is None:
        return nodes
    # Of padding tokens alone, the walk ends at the first one, where the stock classifier reads too.
    while (back := (row.input_ids[nodes] == pad_token_id) & (row.parent[nodes] >= 0)).any():
        nodes = torch.where(back, row.parent[nodes], nodes)
    return nodes
