"""Parts of layers that mix tokens by their own means: run along each path of a row's trees, as if it stood alone.

A recurrence, a convolution, an attention with code of its own or with biases by index: whatever it does, it does it to a
sequence. So its inputs are gathered from the row path by path, the family's own code runs on these as on a batch of sequences
that are padded behind, and each token's output is read from the first path that holds it. What mixes tokens in these parts
costs what it costs without sharing; their products with weights (see `path_batches`), everything else in a layer, and other
layers still see a shared token once.

What is given for each token goes with the tokens (hidden states, positions, rotations by position); what is made by index
(masks, ALiBi's biases) is that of any sequence, and so of each path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import Any, cast

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from preftree.models import interface
from preftree.models.interface import ActiveRow, RowMask
from preftree.models.path_batches import BY_PLACE, PathBatches, Sequences, read
from preftree.models.replaced import forward_replaced, hooked


def along_paths(module: torch.nn.Module, active: ActiveRow, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a module's stock forward pass gives for a row's tokens ``[1, S, ...]`` where it runs along each path by itself."""
    active.path_calls += 1
    while True:
        paths, results = PathBatches.of(active.row, active.paths_together), []
        sequences = [Sequences(batch, module) for batch in paths.batches]
        with interface.no_row(), interface.as_stock(_config(module)):
            for batch in sequences:
                given, named = _along((args, kwargs), batch, len(active.row))
                if not batch.given:
                    raise NotImplementedError(f"{type(module).__name__} is given nothing that a row's tokens have each")
                with batch:
                    results.append(type(module).forward(module, *given, **named))
        if len(results) == 1 or _alike(results, paths):
            return _back(results, sequences, paths)
        # As wide as sequences are long, places in them perhaps, for layers behind to go on with: of one batch then.
        active.paths_together = True


def _alike(results: list[Any], paths: PathBatches) -> bool:
    """Whether results of several batches can stand one behind the other."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        of_places = first.shape[:2] == paths.batches[0].local.shape
        return not of_places or len({result.shape[2:] for result in results}) == 1
    return type(first) not in (tuple, list) or all(_alike(list(each), paths) for each in zip(*results, strict=True))


def _config(module: torch.nn.Module) -> Any:
    """The configuration that a module's code reads, if it has one."""
    return next((part.config for part in module.modules() if hasattr(part, "config")), None)


def _along(given: Any, sequences: Sequences, length: int) -> Any:
    """An argument for a row as one for paths."""
    if isinstance(given, RowMask):
        return given.for_sequences(*sequences.batch.local.shape)
    if isinstance(given, torch.Tensor):
        return _tensor_along(given, sequences, length)
    if type(given) in (tuple, list):
        return type(given)(_along(each, sequences, length) for each in given)
    if type(given) is dict:
        return {name: _along(each, sequences, length) for name, each in given.items()}
    return given


def _tensor_along(given: torch.Tensor, sequences: Sequences, length: int) -> torch.Tensor:
    batch = sequences.batch
    paths, longest = batch.local.shape
    shape = given.shape
    if given.ndim >= 2 and shape[0] == 1 and shape[1] == length:  # [1, S, ...]: of tokens
        return sequences.along(given[0] if len(batch.tokens) == length else read(given[0], batch.tokens))
    if given.ndim >= 2 and shape[-2:] == (length, length):  # [1, ..., S, S]: a mask
        mask = given[..., :longest, :longest]
        return mask.expand(paths, *mask.shape[1:]) if given.ndim == 4 and shape[0] == 1 else mask
    if given.ndim == 4 and shape[0] == 1 and shape[2] == length:  # [1, heads or 1, S, D]: of tokens
        return given[0][:, batch.nodes].transpose(0, 1)
    if given.ndim == 3 and shape[1] == 1 and shape[2] == length:
        if not given.is_floating_point():  # [axes, 1, S]: positions on several axes
            return given[:, 0][:, batch.nodes]
        return given[..., :longest].repeat(paths, 1, 1)  # [heads, 1, S]: biases of keys
    if given.ndim == 4 and shape[0] == 1 and shape[-1] == length:  # [1, heads, 1, S]
        return given[..., :longest].expand(paths, *shape[1:-1], longest)
    if given.ndim in (1, 2) and shape[0] == length:  # [S], [S, D]: by index
        return given[:longest]
    return given


def _back(results: list[Any], sequences: list[Sequences], paths: PathBatches) -> Any:
    """What each batch of paths gave, as one result for the row's tokens."""
    first = results[0]
    if isinstance(first, torch.Tensor):
        places = paths.batches[0].local.shape
        if first.shape[:2] == places:  # [P, L, ...]
            return paths.back([own.at_tokens(x) for own, x in zip(sequences, results, strict=True)])[None]
        if first.shape[:1] == (places.numel(),):  # [P L, ...]: a router's, say
            return paths.back([own.at_tokens(x) for own, x in zip(paths.batches, results, strict=True)])
        # Weights of attention are nothing that a layer goes on with; what has no tokens is the same for all.
        return None if first.ndim > 2 and first.shape[0] == places[0] else first
    if type(first) in (tuple, list):
        return type(first)(_back(list(each), sequences, paths) for each in zip(*results, strict=True))
    return first


def _row_aware(stock: Callable[..., Any]) -> Callable[..., Any]:
    # As `prepare._tree_aware`: no module in a closure. (Of a compiled layer it runs between the compiled parts.)
    @torch.compiler.disable
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        if (active := interface.active_row()) is not None:
            return along_paths(self, active, args, kwargs)
        with interface.as_stock(_config(self)):
            return type(self).forward(self, *args, **kwargs)

    return forward


def run_along_paths(modules: list[torch.nn.Module]) -> None:
    """Let modules of a model run rows along their paths; everything else as before.

    Raises:
        NotImplementedError: for a module whose forward pass somebody else has replaced.
    """
    for module in modules:
        if "forward" in vars(module):
            raise NotImplementedError(
                f"the forward pass of {type(module).__name__}, which would run along paths, has been replaced on this model "
                "(by offloading or dispatching it?): prepare the model before"
            )
    for module in modules:
        module.forward = MethodType(_row_aware(type(module).forward), module)
        # What a checkpoint within it runs again, in the backward pass, runs by itself.
        if any(isinstance(part, GradientCheckpointingLayer) for part in module.modules()):
            setattr(module, BY_PLACE, True)


def restore(modules: list[torch.nn.Module]) -> None:
    """Undo `run_along_paths`."""
    for module in modules:
        for name in ("forward", BY_PLACE):
            vars(module).pop(name, None)


@torch.no_grad()
def find_lost(mixing: list[torch.nn.Module], run: Callable[[], Any]) -> list[torch.nn.Module]:
    """Of parts that mix tokens, those that do not attend to a row through its mask.

    Args:
        mixing: what `find_mixers` gave.
        run: a run of the prepared model on a row.
    """
    lost: list[torch.nn.Module] = []

    def probe(self, *args, **kwargs):
        active = interface.active_row()
        stock = functools.partial(type(self).forward, self)
        if active is None:
            return stock(*args, **kwargs)
        if self not in lost:
            before = active.attention_calls
            with suppress(Exception):  # in whatever way the family's code stumbles over a row
                output = stock(*args, **kwargs)
                if active.attention_calls > before:
                    return output
            lost.append(self)
        return along_paths(self, active, args, kwargs)

    with ExitStack() as stack:
        for module in mixing:
            stack.enter_context(forward_replaced(module, MethodType(probe, module)))
        run()
    return lost


# A layer's class, the name of a part in it, and the part's own class.
Place = tuple[type, str, type]


def _parts(layers: torch.nn.ModuleList | None) -> dict[torch.nn.Module, Place]:
    """The layers' parts and where they stand."""
    return {part: (type(layer), name, type(part)) for layer in layers or () for name, part in layer.named_children()}


def places_of(layers: torch.nn.ModuleList | None, parts: Sequence[torch.nn.Module]) -> set[Place]:
    """Where these parts of layers stand."""
    places = _parts(layers)
    return {places[part] for part in parts}


def at_places(layers: torch.nn.ModuleList | None, places: Collection[Place]) -> list[torch.nn.Module]:
    """The parts of layers that stand at these places."""
    return [part for part, place in _parts(layers).items() if place in places]


@torch.no_grad()
def find_mixers(
    layers: torch.nn.ModuleList | None, run: Callable[[], Any], known: Collection[Place] = ()
) -> list[torch.nn.Module]:
    """Parts of layers whose output at a token changes with tokens before it.

    Args:
        layers: a model's.
        run: a run of the stock model on one sequence ``[1, T]``.
        known: `places_of` parts that do whatever their weights, which may be zeros.
    """
    calls: dict[torch.nn.Module, tuple[tuple, dict[str, Any]]] = {}

    def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, kwargs))

    places = _parts(layers)
    with hooked(part.register_forward_pre_hook(record, with_kwargs=True) for part in places):
        run()
    return [part for part, given in calls.items() if places[part] in known or _mixes(part, *given)]


def _mixes(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    values = list(args) + list(kwargs.values())
    place = next(
        (i for i, x in enumerate(values) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 3), None
    )
    if place is None:
        return False
    hidden = cast(torch.Tensor, values[place])
    changed = hidden.clone()
    changed[:, :-1] = -changed[:, :-1].roll(1, -1)
    last = []
    for given in (hidden, changed):
        values[place] = given
        output = module(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
        while isinstance(output, (tuple, list)):
            output = output[0]
        if not isinstance(output, torch.Tensor) or output.shape[:2] != hidden.shape[:2]:
            return False
        last.append(output[:, -1].double())
    return bool((last[0] - last[1]).abs().max() > 1e-3 * last[0].abs().max())


@contextmanager
def in_checkpoints(model: torch.nn.Module, active: ActiveRow) -> Iterator[None]:
    """While inside, what activation checkpointing runs again finds the row that is running now."""
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            before.append((module, function))
            cast(Any, module)._gradient_checkpointing_func = _with_row(function, active)
    try:
        yield
    finally:
        for module, function in before:
            module._gradient_checkpointing_func = function


def _with_row(checkpoint: Callable[..., Any], active: ActiveRow) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args, **kwargs):
        def again(*given, **named):
            with interface.resumed(active):
                return function(*given, **named)

        return checkpoint(again, *args, **kwargs)

    run.keywords = getattr(checkpoint, "keywords", {})  # type: ignore[attr-defined]
    return run
