"""Tree attention path by path: each query block (`paths`) is ordinary attention to the keys of its path.

On a GPU all blocks go into one call of a variable-length kernel, over keys that are copied path by path. Elsewhere each
block is one call of scaled dot-product attention. Work grows with the sum over blocks of (queries x path length): a row
costs what its trees cost, not the square of the row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from preftree.attention import fa4, trial, varlen_kernels
from preftree.attention.layer import Layer
from preftree.attention.mask import Rule
from preftree.attention.passes import Gradients, differentiable, recomputed_backward, recomputed_forward
from preftree.attention.paths import QueryBlock, plan_paths, query_blocks
from preftree.attention.scores import Scores, masked_attention, repeat_heads
from preftree.packing import PackedRow


def refusal(layer: Layer) -> str | None:
    """Why this backend cannot serve a layer, or None: where there is no kernel for it, blocks go one by one through torch."""
    if layer.rule.nodes is not None:
        return "the family lets tokens (an image's) attend to tokens behind them, which path by path none does"
    return None


def bind(row: PackedRow, rule: Rule):
    """Attention path by path; exact on every device, through one kernel where there is one for the layer."""
    return _OnRow(row, rule)


class _OnRow:
    """Attention bound to a row."""

    def __init__(self, row: PackedRow, rule: Rule, kernel: str | None = None):
        self.row, self.rule, self._given = row, rule, kernel
        self._one_by_one: _OneByOne | None = None
        self._kernels: dict[Layer, str | None] = {}

    def _kernel(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> str | None:
        """See `_kernel_for`."""
        layer = Layer.of(q_BHSD, k_BGSD, v_BGSE, self.rule, scores)
        if layer not in self._kernels:
            self._kernels[layer] = self._given or _kernel_for(layer, q_BHSD.device)
        return self._kernels[layer] if self.row.num_tokens else None

    def __call__(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> torch.Tensor:
        kernel = self._kernel(q_BHSD, k_BGSD, v_BGSE, scores)
        if kernel == "fa4":
            return differentiable(self, q_BHSD, k_BGSD, v_BGSE, scores)
        if kernel == "torch":
            plan, window = plan_paths(self.row, self.rule.window), self.rule.window
            q_SHD, k_SGD, v_SGE = map(_by_token, (q_BHSD, k_BGSD, v_BGSE))
            return varlen_kernels.by_torch(q_SHD, k_SGD, v_SGE, plan, window, scores).transpose(0, 1)[None]
        if self._one_by_one is None:
            self._one_by_one = _OneByOne(self.row, self.rule)
        return self._one_by_one(q_BHSD, k_BGSD, v_BGSE, scores)

    def forward(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kernel(q_BHSD, k_BGSD, v_BGSE, scores) != "fa4":
            return recomputed_forward(self, q_BHSD, k_BGSD, v_BGSE, scores)
        plan, window = plan_paths(self.row, self.rule.window), self.rule.window
        q_SHD, k_SGD, v_SGE = map(_by_token, fa4.widened(q_BHSD, k_BGSD, v_BGSE))
        out_SHE, lse_HT = varlen_kernels.fa4_forward(q_SHD, k_SGD, v_SGE, plan, window, scores)
        out_SHE = fa4.narrowed(out_SHE, v_BGSE.shape[-1])
        return out_SHE.transpose(0, 1)[None], F.pad(lse_HT, (0, len(self.row) - plan.num_tokens))[None]

    def backward(self, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE, lse_BHS, scores: Scores) -> Gradients:
        if self._kernel(q_BHSD, k_BGSD, v_BGSE, scores) != "fa4":
            return recomputed_backward(self, grad_BHSE, q_BHSD, k_BGSD, v_BGSE, scores)
        plan, window = plan_paths(self.row, self.rule.window), self.rule.window
        grad, q, k, v, out = map(_by_token, fa4.widened(grad_BHSE, q_BHSD, k_BGSD, v_BGSE, out_BHSE))
        lse_HT = lse_BHS.squeeze(0)[:, : plan.num_tokens].contiguous()
        *by_token, dsinks = varlen_kernels.fa4_backward(grad, q, k, v, out, lse_HT, plan, window, scores)
        dq, dk, dv = (x.transpose(0, 1)[None] for x in by_token)
        dq, dk = (fa4.narrowed(x, q_BHSD.shape[-1]) for x in (dq, dk))
        return dq, dk, fa4.narrowed(dv, v_BGSE.shape[-1]), dsinks, None


@cache
def _fa4_works(kind: Layer, device: torch.device) -> bool:
    """Whether FlashAttention-4 gives what it should, tried on a few numbers."""
    warning = (
        f"the installed flash-attn-4 does not compute attention path by path at head size {kind.size}, torch does it"
    )
    return trial.passed(partial(_OnRow, kernel="fa4"), kind, device, warning)


def _kernel_for(layer: Layer, device: torch.device) -> str | None:
    """The fastest kernel that serves a layer and gives what it should; None for blocks one by one."""
    kernel = varlen_kernels.choose(layer)
    if kernel == "fa4" and not _fa4_works(trial.kind_of(layer), device):
        return "torch" if varlen_kernels.torch_refusal(layer) is None else None
    return kernel


def _by_token(x_BHSD: torch.Tensor) -> torch.Tensor:
    """A row's ``[S, H, D]``."""
    # `squeeze`, not `[0]`: the gradient of a view is a view, of an element a tensor of zeros and a copy.
    return x_BHSD.squeeze(0).transpose(0, 1)


class _OneByOne:
    """Blocks one after the other; under a rule other than causal with the part of the mask that each needs."""

    def __init__(self, row: PackedRow, rule: Rule):
        self.row = row
        self.blocks = query_blocks(row.runs)
        self.visible = [self._visible(block, rule) for block in self.blocks]

    def _visible(self, block: QueryBlock, rule: Rule) -> tuple[int, torch.Tensor | None]:
        """The first key that a query sees, and bool ``[Q, K]`` from that key on: None where the causal flag says it."""
        depth, length = block.depth, block.stop - block.start
        key_positions = torch.arange(depth + length, device=self.row.device)
        query_positions = key_positions[depth:]
        causal = key_positions[None, :] <= query_positions[:, None]
        visible = causal if rule.causal else causal & rule(query_positions, key_positions)
        if depth == 0 and (rule.causal or bool((visible == causal).all())):
            return 0, None
        first = 0 if rule.causal else int(visible.any(0).int().argmax())
        return first, visible[:, first:]

    def __call__(self, q_BHSD, k_BGSD, v_BGSE, scores: Scores) -> torch.Tensor:
        row, blocks = self.row, self.blocks
        # `split` once, not a slice a run: the gradient of a slice is a row-long tensor of zeros, of a split one `cat`.
        lengths = [block.stop - block.start for block in blocks]
        q_blocks = q_BHSD[:, :, : row.num_tokens].split(lengths, dim=2)
        borders = sorted({0, row.num_tokens}.union(*((b.start, b.stop, *sum(b.above, ())) for b in blocks)))
        pieces = [stop - start for start, stop in pairwise(borders)]
        index = {border: i for i, border in enumerate(borders)}
        k_pieces = k_BGSD[:, :, : row.num_tokens].split(pieces, dim=2)
        v_pieces = v_BGSE[:, :, : row.num_tokens].split(pieces, dim=2)
        outputs = []
        for block, (first, visible_QK), q_BHQD in zip(blocks, self.visible, q_blocks, strict=True):
            intervals = (*block.above, (block.start, block.stop))
            path = [i for start, stop in intervals for i in range(index[start], index[stop])]
            k_BGKD = torch.cat([k_pieces[i] for i in path], dim=2)[:, :, first:]
            v_BGKE = torch.cat([v_pieces[i] for i in path], dim=2)[:, :, first:]
            here = scores
            if scores.bias is not None:
                keys = torch.cat([torch.arange(*interval, device=row.device) for interval in intervals])
                queries = keys[len(keys) - q_BHQD.shape[2] :]
                here = replace(scores, bias=scores.bias.index_select(-2, queries).index_select(-1, keys[first:]))
            outputs.append(_attend_block(q_BHQD, k_BGKD, v_BGKE, visible_QK, here))
        if row.num_tokens < len(row):
            # A padding token sees itself alone, so its output is its value.
            outputs.append(repeat_heads(v_BGSE[:, :, row.num_tokens :], q_BHSD.shape[1]))
        if not blocks:
            # A row of nothing but padding still takes part in gradients, or ranks would wait for each other's.
            outputs[0] = outputs[0] + 0 * (q_BHSD.sum() + k_BGSD.sum())
        return torch.cat(outputs, dim=2)


def _attend_block(q_BHQD, k_BGKD, v_BGKE, visible_QK, scores: Scores) -> torch.Tensor:
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
