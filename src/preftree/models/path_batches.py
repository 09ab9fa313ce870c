"""The paths of a row as batches of sequences, for code that takes such; what it does to tokens alone, once a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from preftree.attention.copying import sum_pieces
from preftree.attention.paths import QueryBlock, query_blocks, tables_of_sums
from preftree.packing import PackedRow
from preftree.transfer import send

# The longest paths of trees that run together may be this much shorter than the longest of all.
_SHORTEST = 0.75
# Products are computed once a token where tokens are at most this share of the places in a batch: copies cost something too.
_FEW_TOKENS = 0.9
# Products with a matrix of weights; the last is what transformers' `Conv1D` calls, with one dimension for all places.
_PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_FLAT_PRODUCT = torch.addmm
# On a module some of whose products are not of tokens.
BY_PLACE = "products_by_place"


@dataclass(frozen=True)
class PathBatch:
    """Paths, from root to leaf, of some of a row's trees, padded behind to one length ``L``. Long, on the row's device.

    Attributes:
        tokens: ``[F]``, the row's tokens in these trees.
        local: ``[P, L]``, which of `tokens` stands at each place of a path; behind a shorter path's end its last one.
        first: ``[F]``, the first place, counted over all paths, that holds a token.
        sources, origins: see `attention.paths.PathPlan`: where the places are whose sum is a token's gradient.
    """

    tokens: torch.Tensor
    local: torch.Tensor
    first: torch.Tensor
    sources: torch.Tensor
    origins: torch.Tensor

    @cached_property
    def nodes(self) -> torch.Tensor:
        """``[P, L]``: which of the row's tokens stands at each place."""
        return self.tokens[self.local]

    def along(self, x: torch.Tensor) -> torch.Tensor:
        """Of tokens ``[F, ...]`` to places ``[P, L, ...]``; differentiable (what padding gives back is left out)."""
        return _Along.apply(x, self)

    def at_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Of places ``[P L, ...]`` to tokens ``[F, ...]``, each read at its first place; differentiable."""
        return read(x, self.first)


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, batch: PathBatch) -> torch.Tensor:
        ctx.batch = batch
        return x.index_select(0, batch.local.flatten()).unflatten(0, batch.local.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        batch, shape = ctx.batch, grad.shape[2:]
        count = len(batch.tokens)
        flat = grad.reshape(batch.local.numel(), 1, -1)
        return sum_pieces(flat, batch.sources, batch.origins, count, count).view(count, *shape), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, index, grad), None


def read(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]`` for an index that holds nothing twice, without the atomic additions of its gradient."""
    return _Read.apply(x, index)


@dataclass(frozen=True)
class PathBatches:
    """All paths of a row.

    Attributes:
        batches: of trees whose longest paths are of about one length.
        tokens: ``[N]``, the tokens of all batches, one behind the other.
        length: the row's, ``S``.
    """

    batches: tuple[PathBatch, ...]
    tokens: torch.Tensor
    length: int

    @classmethod
    def of(cls, row: PackedRow, together: bool = False) -> PathBatches:
        """Of a row, made once; all in one batch if ``together``."""
        key = ("path batches", together)
        if key not in row.derived:
            row.derived[key] = cls._of(row, 0.0 if together else _SHORTEST)
        return row.derived[key]

    @classmethod
    def _of(cls, row: PackedRow, shortest: float) -> PathBatches:
        trees: list[list[QueryBlock]] = []
        # A row of nothing but padding has one path: weights are to see a gradient, if of zeros.
        for block in query_blocks(row.runs or ((0, 1, -1),)):
            if not block.above:
                trees.append([])
            trees[-1].append(block)
        batches: list[list[list[QueryBlock]]] = []
        longest = 0
        for tree in sorted(trees, key=lambda tree: -max(map(_length, tree))):
            own = max(map(_length, tree))
            if not batches or own < shortest * longest:
                batches.append([])
                longest = own
            batches[-1].append(tree)
        made = [_tables(batch) for batch in batches]
        sent = iter(send([table for tables in made for table in tables], row.device))
        found = tuple(PathBatch(*(next(sent) for _ in tables)) for tables in made)
        return cls(found, torch.cat([batch.tokens for batch in found]), len(row))

    def back(self, x: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of each batch's tokens to the row's, ``[S, ...]``, with zeros at its padding; differentiable."""
        values = torch.cat(list(x)) if len(x) > 1 else x[0]
        return values.new_zeros(self.length, *values.shape[1:]).index_copy(0, self.tokens, values)


def _length(block: QueryBlock) -> int:
    return block.depth + block.stop - block.start


def _tables(trees: Sequence[Sequence[QueryBlock]]) -> tuple[torch.Tensor, ...]:
    """The fields of `PathBatch`."""
    longest = max(_length(block) for tree in trees for block in tree)
    tokens: list[torch.Tensor] = []
    local: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    pieces: list[tuple[int, int, int, int]] = []
    count = 0
    for tree in trees:
        start = tree[0].start
        tokens.append(torch.arange(start, tree[-1].stop))
        for block in tree:
            path = []
            place = len(local) * longest
            first.append(place + torch.arange(block.depth, _length(block)))
            for begin, end in block.keys(None):
                path.append(torch.arange(begin, end) - start + count)
                pieces.append((begin - start + count, place, end - begin, 0))
                place += end - begin
            walk = torch.cat(path)
            local.append(torch.cat((walk, walk[-1:].expand(longest - len(walk)))))
        count += len(tokens[-1])
    sources, origins = (torch.tensor(table, dtype=torch.int32) for table in tables_of_sums(pieces))
    return torch.cat(tokens), torch.stack(local), torch.cat(first), sources, origins


@dataclass(eq=False)
class Sequences(TorchFunctionMode):
    """A batch of paths while a module's code runs on it: its products of tokens with weights are computed once a token,
    not once a place, whatever part of the module they belong to: projections, adapters.

    All places of a token hold the same, for the code is causal. Which products are of tokens is told by shapes. A module that
    has others too is left alone from then on, as are batches that hold hardly any token twice.

    Args:
        batch: the paths.
        module: whose code runs.
    """

    batch: PathBatch
    module: torch.nn.Module
    # Of a tensor of places that lives: its version and what it was made by, then the same of tokens. (An autograd function
    # that multiplies makes its result its own, with a gradient that what it multiplied does not have.)
    _known: WeakTensorKeyDictionary = field(init=False, default_factory=WeakTensorKeyDictionary)

    def __post_init__(self):
        super().__init__()
        self._few = len(self.batch.tokens) <= _FEW_TOKENS * self.batch.local.numel()

    @property
    def given(self) -> bool:
        """Whether there has been anything of tokens."""
        return len(self._known) > 0

    def along(self, x: torch.Tensor) -> torch.Tensor:
        """See `PathBatch.along`."""
        places = self.batch.along(x)
        self._known[places] = places._version, places.grad_fn, x
        return places

    def at_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Of places ``[P, L, ...]`` to tokens ``[F, ...]``: what they came from, or each token's first place."""
        version, made_by, tokens = self._known.get(x, (None, None, x))
        if x._version == version and x.grad_fn is made_by:
            return tokens
        return self.batch.at_tokens(x.flatten(0, 1))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not getattr(self.module, BY_PLACE, False):
            places = self.batch.local.shape
            if func in _PRODUCTS and len(args) > 1 and args[0].ndim > 2 and args[1].ndim == 2:
                x, *others = args
                if self._are_places(x.shape[:2] == places and x.ndim == 3):
                    return self.along(func(self.at_tokens(x), *others, **kwargs))
            elif func is _FLAT_PRODUCT and len(args) == 3:
                added, x, weight = args
                if self._are_places(len(x) == places.numel()):
                    return self.batch.along(func(added, self.batch.at_tokens(x), weight, **kwargs)).flatten(0, 1)
        return func(*args, **kwargs)

    def _are_places(self, alike: bool) -> bool:
        """Whether to go by tokens, for what is shaped like the batch's places or is not."""
        if not alike:
            setattr(self.module, BY_PLACE, True)
        return alike and self._few
