"""Tree attention run by run: each unbranched run of nodes attends to the keys of its path from the root.

Within a path, positions are those of an ordinary sequence, so each call is ordinary attention. Work grows with the
sum over runs of (run length x path length): a packed row costs what its trees cost, not the square of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from preftree.attention.mask import Rule
from preftree.attention.scores import Scores, masked_attention, repeat_heads
from preftree.packing import PackedRow


@dataclass(frozen=True)
class _Run:
    """One run of queries and the runs whose keys it sees.

    `visible` is None where the plain causal flag says it all (a run at a root under a rule that is causal there);
    otherwise bool ``[Q, K]`` over the path's keys from key `first_key` on: those before it no query sees.
    """

    path: tuple[int, ...]
    first_key: int
    visible: torch.Tensor | None


def _plan(row: PackedRow, rule: Rule) -> list[_Run]:
    plan: list[_Run] = []
    depth_after: list[int] = []
    for index, (start, stop, before) in enumerate(row.runs):
        path = (*plan[before].path, index) if before >= 0 else (index,)
        depth = depth_after[before] if before >= 0 else 0
        length = stop - start
        depth_after.append(depth + length)
        key_positions = torch.arange(depth + length, device=row.device)
        query_positions = key_positions[depth:]
        causal = key_positions[None, :] <= query_positions[:, None]
        visible = causal if rule.causal else causal & rule(query_positions, key_positions)
        first_key = 0
        if not rule.causal:
            seen = visible.any(0)
            first_key = int(seen.int().argmax())
            visible = visible[:, first_key:]
        if depth == 0 and first_key == 0 and (rule.causal or bool((visible == causal).all())):
            plan.append(_Run(path, 0, None))
        else:
            plan.append(_Run(path, first_key, visible))
    return plan


def bind(row: PackedRow, rule: Rule):
    """Attention path by path; exact on every device, made for a CPU (a GPU wants fewer, larger calls)."""
    plan = _plan(row, rule)
    lengths = [stop - start for start, stop, _ in row.runs]
    padding = len(row) - row.num_tokens
    node_of_path = {run.path: _path_nodes(row, run.path) for run in plan} if plan else {}

    def attend(q_BHSD, k_BGSD, v_BGSE, scores: Scores):
        # `split` once, not a slice a run: the gradient of a slice is a row-long tensor of zeros, of a split one `cat`.
        q_runs = q_BHSD[:, :, : row.num_tokens].split(lengths, dim=2)
        k_runs = k_BGSD[:, :, : row.num_tokens].split(lengths, dim=2)
        v_runs = v_BGSE[:, :, : row.num_tokens].split(lengths, dim=2)
        outputs = []
        for run, q_BHQD in zip(plan, q_runs, strict=True):
            k_BGKD = torch.cat([k_runs[i] for i in run.path], dim=2)[:, :, run.first_key :]
            v_BGKE = torch.cat([v_runs[i] for i in run.path], dim=2)[:, :, run.first_key :]
            if scores.bias is not None:
                keys = node_of_path[run.path]
                queries = keys[len(keys) - q_BHQD.shape[2] :]
                bias = scores.bias.index_select(-2, queries).index_select(-1, keys[run.first_key :])
                outputs.append(_attend_run(q_BHQD, k_BGKD, v_BGKE, run.visible, replace(scores, bias=bias)))
            else:
                outputs.append(_attend_run(q_BHQD, k_BGKD, v_BGKE, run.visible, scores))
        if padding:
            # A padding token sees itself alone, so its output is its value.
            outputs.append(repeat_heads(v_BGSE[:, :, row.num_tokens :], q_BHSD.shape[1]))
        if not plan:
            # A row of nothing but padding still takes part in gradients, or ranks would wait for each other's.
            outputs[0] = outputs[0] + 0 * (q_BHSD.sum() + k_BGSD.sum())
        return torch.cat(outputs, dim=2)

    return attend


def _path_nodes(row: PackedRow, path: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(row.runs[i][0], row.runs[i][1], device=row.device) for i in path])


def _attend_run(q_BHQD, k_BGKD, v_BGKE, visible_QK, scores: Scores) -> torch.Tensor:
    if not scores.plain:
        if visible_QK is None:
            visible_QK = torch.ones(q_BHQD.shape[2], k_BGKD.shape[2], dtype=torch.bool, device=q_BHQD.device).tril()
        return masked_attention(q_BHQD, k_BGKD, v_BGKE, visible_QK, scores)
    heads = q_BHQD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHQD,
        repeat_heads(k_BGKD, heads),
        repeat_heads(v_BGKE, heads),
        attn_mask=visible_QK,
        is_causal=visible_QK is None,
        scale=scores.scale,
    )
