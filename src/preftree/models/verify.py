"""A short run of the prepared model against the stock model on each sequence alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from preftree.models import interface
from preftree.models.interface import as_stock
from preftree.models.last_layer import add_last_layer_hook
from preftree.models.prepared import PreparedModel, takes
from preftree.models.replaced import hooked, in_evaluation
from preftree.packing import PackedRow, pack
from preftree.tree import TokenTree

# Lengths of (prompt, responses) of the trees that are tried; in the first one, two responses begin alike.
_TREES = ((7, (5, 6, 3)), (4, (3, 2)))
# Relative to the largest hidden state.
_TOLERANCE = 1e-4
# Times what rounding alone does to the same model.
_ROUNDING = 3.0


def _trees(vocabulary: int) -> tuple[list[TokenTree], list[list[int]]]:
    generator = torch.Generator().manual_seed(20410)
    trees, sequences = [], []

    def draw(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    for prompt_length, responses in _TREES:
        prompt = draw(prompt_length)
        branches = [draw(length) for length in responses]
        branches[1][:2] = branches[0][:2]
        members = [prompt + branch for branch in branches]
        trees.append(TokenTree.from_sequences(members, [prompt_length] * len(members)))
        sequences.extend(members)
    return trees, sequences


def _row(trees: list[TokenTree]) -> PackedRow:
    return pack(trees, row_length=sum(len(tree) for tree in trees) + 5)[0]


def small_row(prepared: PreparedModel) -> PackedRow:
    """A row of a few trees and padding, on the model's device."""
    return _row(_trees(prepared.vocabulary_size)[0]).to(prepared.device)


def small_batch(prepared: PreparedModel) -> dict[str, Any]:
    """Arguments of the stock model for one sequence."""
    sequence = max(_trees(prepared.vocabulary_size)[1], key=len)
    return {"input_ids": torch.tensor([sequence], device=prepared.device), "use_cache": False}


@torch.no_grad()
def first_position(prepared: PreparedModel) -> int:
    """Where the stock model places a sequence's first token, as the embeddings that it looks up show; 0 if nothing shows."""
    ids = small_batch(prepared)["input_ids"]
    looked_up: list[torch.Tensor] = []
    embeddings = [part for part in prepared.backbone.modules() if isinstance(part, torch.nn.Embedding)]
    hooks = (part.register_forward_pre_hook(lambda module, args: looked_up.extend(args[:1])) for part in embeddings)
    with hooked(hooks), in_evaluation(prepared.model):
        _stock_hidden(prepared, ids)
    places = torch.arange(ids.shape[1], device=ids.device)
    for given in looked_up:
        if given.shape[-1:] == places.shape and not given.is_floating_point():
            first = given.flatten()[: len(places)] - places
            if bool((first == first[0]).all()) and int(first[0]) > 0:
                return int(first[0])
    return 0


@torch.no_grad()
def verify_on_tree(prepared: PreparedModel) -> float:
    """Compare hidden states of a small row with the stock model's on each of its sequences alone.

    What counts as equal is measured: the stock model's own difference between a sequence alone and the same sequence with
    tokens behind it, which a causal model must not see, and with embeddings that are moved by a rounding step, after which
    every layer rounds otherwise. (The first shows nothing where a device's kernels compute a token alike at any length.)
    Whether it sees the tokens behind is told by exchanging them: the shapes stay the same, so a causal model's hidden
    states do too, whatever its precision.

    Returns:
        The difference that rounding explains, as `_distance` measures it.

    Raises:
        NotImplementedError: if they differ by more than rounding, or the model cannot run a tree.
        ValueError: if the stock model's hidden states are not finite.
    """
    model = prepared.model
    device, dtype = prepared.device, prepared.dtype
    trees, sequences = _trees(prepared.vocabulary_size)
    row = _row(trees).to(device)
    with in_evaluation(model):
        stock, noise, change, scale = [], 0.0, 0.0, 0.0
        for seed, sequence in enumerate(sequences):
            ids = torch.tensor([sequence], device=device)
            alone = _stock_hidden(prepared, ids)
            followed, otherwise = (
                _stock_hidden(prepared, torch.cat((ids, behind), dim=1))[: len(sequence)]
                for behind in (ids.flip(1), (ids + 1) % prepared.vocabulary_size)
            )
            with _embeddings_moved(prepared, seed):
                moved = _stock_hidden(prepared, ids)
            noise = max(noise, _distance(alone, followed), _distance(alone, moved))
            change = max(change, _distance(otherwise, followed))
            scale = max(scale, _distance(alone, torch.zeros_like(alone)))
            stock.append(alone)
        if not all(bool(torch.isfinite(alone).all()) for alone in stock):
            raise ValueError(
                f"{type(model).__name__}: the stock model gives hidden states that are not finite: "
                "look for NaN or infinity in its weights"
            )
        if change > max(_TOLERANCE, 4 * torch.finfo(dtype).eps) * scale:
            raise NotImplementedError(
                f"the stock model's hidden states change by {change:.2g} (the largest is {scale:.2g}) with the tokens "
                "that follow: it is not causal (is it an encoder that lacks is_decoder=True?)"
            )
        try:
            hidden_SH = prepared.hidden_states(row).double()
        except NotImplementedError:
            raise
        except Exception as error:  # a family whose code cannot take the mask fails in its own way: report which
            raise NotImplementedError(
                f"its forward pass fails on a row of trees ({type(error).__name__}: {error})"
            ) from error
        first = 0
        worst = 0.0
        for tree in trees:
            for path in tree.paths:
                got = hidden_SH[path.to(device) + first]
                worst = max(worst, _distance(got, stock.pop(0)))
            first += len(tree)
        allowed = max(_ROUNDING * noise, _TOLERANCE * scale)
        if worst > allowed:
            raise NotImplementedError(
                f"hidden states of a small tree differ from the stock model's by {worst:.2g} (rounding explains "
                f"{noise:.2g}, the largest is {scale:.2g}): its arithmetic depends on a token's place in the row"
            )
        _verify_head(prepared, sequences[0], device)
        _verify_training(prepared, sequences[0], scale)
        return allowed


@torch.no_grad()
def verify_images(prepared: PreparedModel, row: PackedRow) -> None:
    """Compare hidden states of a row with images with the stock model's on some of its sequences alone, with their images.

    The first two sequences with images are tried, which are of one prompt, and the last one. What counts as equal is measured
    as in `verify_on_tree`, with images that are moved as well. Where the last layer cannot be cut in rows with images, it no
    longer is.

    Raises:
        NotImplementedError: if they differ by more than rounding, or the model cannot run the row.
    """
    model, images = prepared.model, row.images
    family = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    if images is None or not (holding := [index for index, place in enumerate(images.set_of) if place >= 0]):
        return
    with in_evaluation(model), torch.autocast(row.device.type, enabled=False):
        stock, noise, scale = [], 0.0, 0.0
        # As many for every rank: they gather weights together.
        for seed, sequence in enumerate((holding[0], holding[min(1, len(holding) - 1)], holding[-1])):
            nodes = row.path(sequence)
            ids, inputs = row.input_ids[nodes][None], images.alone(sequence, nodes)
            alone = _stock_hidden(prepared, ids, inputs)
            with _embeddings_moved(prepared, seed):
                floats = {name: value for name, value in inputs.items() if value.is_floating_point()}
                moved = {name: _moved(value, seed) for name, value in floats.items()}
                noise = max(noise, _distance(alone, _stock_hidden(prepared, ids, inputs | moved)))
            scale = max(scale, _distance(alone, torch.zeros_like(alone)))
            stock.append((nodes, alone))
        allowed = max(_ROUNDING * noise, _TOLERANCE * scale)
        cuts, prepared.cuts_with_images = prepared.cuts_with_images, False
        try:
            hidden_SH = prepared.hidden_states(row).double()
        except (ValueError, torch.OutOfMemoryError):  # the images', and the device's
            raise
        except Exception as error:  # in whatever way the family's code stumbles
            why = str(error) if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {error}"
            raise NotImplementedError(f"{family} cannot share prefixes with images exactly: {why}") from error
        worst = max(_distance(hidden_SH[nodes], alone) for nodes, alone in stock)
        if not worst <= allowed:
            raise NotImplementedError(
                f"{family} cannot share prefixes with images exactly: hidden states of a row differ from the stock model's by "
                f"{worst:.2g} (rounding explains {noise:.2g}, the largest is {scale:.2g})"
            )
        prepared.cuts_with_images = cuts
        if cuts and prepared.last_layer_at_tokens and row.read_nodes.numel():
            try:
                hidden_NH = prepared.hidden_states(row, row.read_nodes).double()
                prepared.cuts_with_images = _distance(hidden_NH, hidden_SH[row.read_nodes]) <= allowed
            except Exception:  # in whatever way the family's code stumbles
                prepared.cuts_with_images = False


@torch.no_grad()
def cut_last_layer(prepared: PreparedModel, allowed: float) -> None:
    """Let the last layer run at some tokens alone, if the family's code bears it: tried on a small row, like all else.

    Args:
        allowed: see `verify_on_tree`.
    """
    row = small_row(prepared)
    with in_evaluation(prepared.model):
        expected_NH = prepared.hidden_states(row)[row.read_nodes].double()
        hook = add_last_layer_hook(prepared.layers)
        prepared.last_layer_at_tokens = True
        try:
            hidden_NH = prepared.hidden_states(row, row.read_nodes).double()
            equal = hidden_NH.shape == expected_NH.shape and _distance(hidden_NH, expected_NH) <= allowed
        except Exception:  # in whatever way the family's code stumbles: it is run as a whole then
            equal = False
    prepared.last_layer_at_tokens = equal
    if hook is not None and not equal:
        hook.remove()


def cut_as_twin(prepared: PreparedModel) -> None:
    """Let the last layer run at some tokens alone, as that of a tiny twin could (see `cut_last_layer`)."""
    # (ZeRO-3 gathers a layer's weights in the order in which they are first used, each once.)
    if not is_deepspeed_zero3_enabled():
        add_last_layer_hook(prepared.layers)
        prepared.last_layer_at_tokens = True


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over ``[L, hidden]``'s last dimension, of the token where it is largest."""
    return float((one - other).square().mean(-1).max().sqrt())


def _embeddings_moved(prepared: PreparedModel, seed: int) -> AbstractContextManager[None]:
    """While inside, embeddings of tokens are a rounding step larger, smaller, or as they are, number by number."""

    def move(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return _moved(output, seed)

    return hooked([cast(torch.nn.Module, prepared.model.get_input_embeddings()).register_forward_hook(move)])


def _moved(values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(-1, 2, values.shape, generator=generator).to(values.device)
    return (values * (1 + torch.finfo(values.dtype).eps * step)).to(values.dtype)


def _stock_hidden(
    prepared: PreparedModel, ids: torch.Tensor, inputs: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The stock model's final hidden states of one sequence ``[1, L]`` and its images, float64 ``[L, hidden]``."""
    options: dict[str, Any] = dict(inputs or {})
    if inputs is not None and takes(prepared.model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    with as_stock(getattr(prepared.backbone, "config", None)), interface.no_row():
        return _stock_run(prepared, ids, **options)[0].double()


def _stock_run(prepared: PreparedModel, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states ``[L, hidden]`` of one sequence ``[1, L]``, and what the head makes of them."""
    captured: list[Any] = []
    hook = prepared.backbone.register_forward_hook(lambda module, args, output: captured.append(output))
    with hooked([hook]):
        logits = prepared.stock_forward(input_ids=ids, use_cache=False, **options).logits[0]
    return captured[-1].last_hidden_state[0], logits


def _verify_head(prepared: PreparedModel, sequence: list[int], device: torch.device) -> None:
    """The head on given hidden states must give the whole model's logits (a classifier: its scores)."""
    hidden, logits = _stock_run(prepared, torch.tensor([sequence], device=device))
    whole = logits.double()
    # A sequence classifier reads the last token that is not padding; this sequence may end with some.
    parts = (prepared.scores(hidden) if prepared.classifies else prepared.logits(hidden)).double()
    if prepared.classifies:
        pad_token_id = prepared.model.config.get_text_config().pad_token_id
        real = [index for index, token in enumerate(sequence) if token != pad_token_id]
        parts = parts[real[-1] if real else 0]
    if parts.shape != whole.shape or float((parts - whole).abs().max()) > 1e-4 * float(whole.abs().max()):
        raise NotImplementedError("its output head cannot be run apart from its backbone")


def _verify_training(prepared: PreparedModel, sequence: list[int], scale: float) -> None:
    """In training, too, the forward pass must give one result: noise would be drawn once where sequences draw it apart.

    Kernels that add up in no fixed order differ between two runs of one seed as well.
    """
    ids = torch.tensor([sequence], device=prepared.device)
    prepared.model.train()
    runs = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(_stock_hidden(prepared, ids))
    unsteady, difference = _distance(runs[0], runs[1]), _distance(runs[0], runs[2])
    if difference > max(_ROUNDING * unsteady, _TOLERANCE * scale):
        raise NotImplementedError(
            f"in training its forward pass is random (hidden states of one sequence differ by {difference:.2g} between two "
            "runs): a shared prefix would get one noise where separate sequences get several. Switch the noise off (a "
            "mixture of experts: router_jitter_noise, input_jitter_noise)"
        )
