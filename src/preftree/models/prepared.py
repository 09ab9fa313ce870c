"""What a prepared model can do beyond the stock one: run its backbone on a row, and its head on hidden states."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, cast

import torch
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from preftree.images import Images
from preftree.models import interface, mixers
from preftree.models.replaced import forward_replaced, hooked, in_evaluation
from preftree.models.rotary import by_length, rotary_limit, rotary_parts
from preftree.models.tables import adding_where_they_lie
from preftree.packing import PackedRow

ATTRIBUTE = "_preftree"
# See `PreparedModel.end_logits`.
_FSDP_COUNTS_MODULES = Version(torch.__version__).release < (2, 13)


class PreparedModel:
    """The two halves of a prepared causal language model, for code that runs inside its forward pass.

    Attributes:
        model: the transformers model itself (below PEFT's wrapper, if any).
        backend: attention backend as the user named it ("auto", "dense", "flex", "varlen").
        contiguous: see `interface.ActiveRow`.
        rounding: how far hidden states of a small row may lie from the stock model's (see `verify`); None if not measured.
        last_layer_at_tokens: the last layer can be computed at some tokens alone (see `last_layer`).
        along_paths: parts of layers that run along the row's paths (see `mixers`).
        paths_together: see `interface.ActiveRow`; known from the first row, that of the verification.
        mixing: all parts that mix tokens, these included; none if that has not been looked for.
        takes_positions: whether the backbone is told where tokens stand.
        position_embeddings: of a backbone that is not, those that can be.
        first_position: what the stock model counts from (RoBERTa: from behind its padding token's).
        decoder: the backbone, or of one that also looks at images, its part that does not.
        try_images: called with the first row that holds images, to raise what `verify.verify_images` raises; then None.
        cuts_with_images: `last_layer_at_tokens` of rows with images.
        rotary_limit, rotary_parts: where frequencies of rotary embeddings change with length, and which modules' (`rotary`).
        twin_cuts: whether the last layer of a tiny twin that was tried in this model's place could; None without one.

    Args:
        like: the twin, prepared.
    """

    def __init__(self, model: PreTrainedModel, backend: str, like: PreparedModel | None = None):
        self.model = model
        self.backend = backend
        self.contiguous = False
        self.stock_forward: Callable[..., Any] = MethodType(type(model).forward, model)
        self.plain_forward = self._forward_now()
        self.twin_cuts: bool | None = None if like is None else like.last_layer_at_tokens
        self.backbone = _find_backbone(model) if like is None else model.get_submodule(like.backbone_name)
        self.decoder = _decoder_of(model, self.backbone)
        self.attention_layers = _num_layers(model)
        self.rounding: float | None = None
        self.last_layer_at_tokens: bool = False
        self.along_paths: list[torch.nn.Module] = []
        self.mixing: list[torch.nn.Module] = []
        self.paths_together = False
        self.takes_positions = takes(self.backbone, "position_ids")
        self.position_embeddings: list[torch.nn.Module] = [
            part
            for part in self.backbone.modules()
            if not self.takes_positions and isinstance(part, torch.nn.Embedding) and takes(part, "position_ids")
        ]
        self.first_position = 0
        self.try_images: Callable[[PreparedModel, PackedRow], None] | None = None
        self.cuts_with_images = True
        self.rotary_limit = rotary_limit(model.config)
        self.rotary_parts = list(rotary_parts(self.backbone)) if self.rotary_limit is not None else []

    def _forward_now(self) -> Callable[..., Any]:
        """What others (TRL, accelerate) may have put in the stock forward pass's place on this instance."""
        return self.model.__dict__.get("forward", self.stock_forward)

    def again(self, backend: str) -> PreparedModel:
        """The same for somebody else who uses the model."""
        other = copy.copy(self)
        other.backend, other.plain_forward = backend, self._forward_now()
        return other

    @property
    def device(self) -> torch.device:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.dtype

    @property
    def layers(self) -> torch.nn.ModuleList | None:
        """The decoder's layers, if it has a list of them."""
        lists = (part for part in self.decoder.modules() if isinstance(part, torch.nn.ModuleList))
        return next((part for part in lists if len(part) == self.attention_layers), None)

    @property
    def backbone_name(self) -> str:
        """Of the backbone among the model's modules."""
        return next(name for name, part in self.model.named_modules() if part is self.backbone)

    @property
    def vocabulary_size(self) -> int:
        """Token ids that the model can both read and score (a sequence classifier: read)."""
        if self.classifies:
            return self.num_embeddings
        return min(self.num_embeddings, _rows(self.model.get_output_embeddings()))

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model can read."""
        return _rows(self.model.get_input_embeddings())

    def hidden_states(self, row: PackedRow, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Final hidden states of a row, ``[S, hidden]``, or of its wanted tokens, ``[N, hidden]`` (see `run`)."""
        return self.run(row, wanted=wanted).last_hidden_state.squeeze(0)

    def run(
        self,
        row: PackedRow,
        position_ids: torch.Tensor | None = None,
        forward: Callable[..., Any] | None = None,
        wanted: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The backbone's output for a row; ``options`` are passed to its forward pass.

        Args:
            position_ids: LongTensor ``[S]``, where the model is to place the tokens; without it, at the row's own
                positions. Windows and chunks count by the row's own positions either way.
            forward: called in place of the backbone.
            wanted: LongTensor ``[N]``, the tokens that hidden states are given for, each once; None for all of them.

        Raises:
            NotImplementedError: if a layer does not attend through the tree, or the model is not exact on the row's images.
            ValueError: for a padding token within a sequence, if the family counts no position for it, and for images that
                cannot be put together.
        """
        device = row.device
        self._try_images(row)
        if row.images is not None:
            options = row.images.inputs | options
        positions = self._positions(row) if position_ids is None else position_ids
        if nothing := wanted is not None and not wanted.numel():
            # Gradients of zero, in the order in which other rows give theirs: DeepSpeed adds up what ranks give in turn.
            wanted = torch.arange(min(len(row), 2), device=device)
        # (What routers say is asked of all tokens.)
        cut = (
            self.last_layer_at_tokens
            and wanted is not None
            and "output_router_logits" not in options
            and (row.images is None or self.cuts_with_images)
        )
        with (
            interface.activate(row, self.backend, self.contiguous, wanted if cut else None) as active,
            adding_where_they_lie(self.model.get_input_embeddings()),
            interface.outside_of_rows(self._beside_the_decoder if row.images is not None else ()),
            mixers.in_checkpoints(self.decoder, active) if self.along_paths else nullcontext(),
            _embedded_at(self.position_embeddings, positions),
            by_length(self.rotary_limit, self.rotary_parts, row),
        ):
            active.paths_together = self.paths_together
            output = (forward or self.backbone)(
                input_ids=row.input_ids[None],
                attention_mask=torch.ones(1, len(row), dtype=torch.long, device=device),
                use_cache=False,
                **(
                    {"position_ids": positions if positions.ndim > 1 else positions[None]}
                    if self.takes_positions
                    else {}
                ),
                **options,
            )
            # Compiled layers find their masks by number: whoever can go back to these hidden states keeps them.
            if (origin := output.last_hidden_state.grad_fn) is not None:
                origin.metadata[ATTRIBUTE] = active.masks
        self.paths_together = active.paths_together
        if wanted is not None and not active.cut:
            output.last_hidden_state = output.last_hidden_state[:, wanted]
        if nothing:
            output.last_hidden_state = output.last_hidden_state[:, :0]
        if active.attention_calls + active.path_calls < (len(self.mixing) or self.attention_layers):
            raise NotImplementedError(
                f"{active.attention_calls} of its {self.attention_layers} layers attend through transformers' "
                "attention interface; the others have attention code of their own, or mix tokens by other means"
            )
        return output

    def _try_images(self, row: PackedRow) -> None:
        check, images = self.try_images, row.images
        if check is None or images is None or max(images.set_of, default=-1) < 0:  # none that a sequence has
            return
        self.try_images = None  # runs the row itself
        try:
            check(self, row)
        except BaseException:
            self.try_images = check
            raise

    @property
    def _beside_the_decoder(self) -> list[torch.nn.Module]:
        """The backbone's other parts: those that look at images."""
        return [part for part in self.backbone.children() if self.decoder not in set(part.modules())]

    def _positions(self, row: PackedRow) -> torch.Tensor:
        """Where the stock model places the tokens of each of the row's sequences, ``[S]``, or ``[..., 1, S]`` if it counts
        images otherwise than text."""
        if row.images is not None and self.decoder is not self.backbone:
            key = ("positions", type(self.backbone))  # policy and reference place them alike
            if key not in row.derived:
                row.derived[key] = self._image_positions(row, row.images)
            if (positions := row.derived[key]) is not None:
                return positions
        if not self.first_position:
            return row.position_ids
        uncounted = self.model.config.get_text_config().pad_token_id
        if bool((row.input_ids[: row.num_tokens] == uncounted).any()):
            raise ValueError(
                f"a sequence holds the padding token {uncounted}, which {type(self.model).__name__} counts no position for"
            )
        return row.position_ids + self.first_position

    @torch.no_grad()
    def _image_positions(self, row: PackedRow, images: Images) -> torch.Tensor | None:
        """Positions by the backbone's own code, which makes them for each sequence alone; None if it leaves that to the
        decoder, which counts tokens.

        Raises:
            NotImplementedError: if sequences place a token that they share at different positions.
        """
        placed: torch.Tensor | None = None
        conflict = torch.zeros((), dtype=torch.bool, device=row.device)
        seen = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        for sequence, place in enumerate(images.set_of):
            if place < 0:
                continue
            nodes = row.path(sequence)
            given = self._given_to_decoder(row.input_ids[nodes][None], images.alone(sequence, nodes))
            if given is None:
                return None
            if placed is None:
                placed = row.position_ids.expand(*given.shape[:-1], -1).clone()
            conflict |= ((placed[..., nodes] != given) & seen[nodes]).any()
            placed[..., nodes] = given
            seen[nodes] = True
        if bool(conflict):
            raise NotImplementedError("it places a token that sequences share otherwise in one of them than in another")
        return placed

    def _given_to_decoder(self, ids: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The positions that the backbone hands to its decoder for a sequence ``[1, L]`` with images, or None."""
        given: list[torch.Tensor | None] = []

        def decode(*args: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any):
            given.append(position_ids)
            return _HiddenStates(last_hidden_state=inputs_embeds)

        # How large images are is enough for that: what is in them is left out, so that nothing looks at it.
        sizes = {name: value for name, value in inputs.items() if not value.is_floating_point()}
        with interface.no_row(), forward_replaced(self.decoder, decode):
            self.backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **sizes)
        return given[0]

    def router_logits(self, output: Any) -> tuple[torch.Tensor, ...]:
        """What the routers of a mixture of experts gave in ``run(row, output_router_logits=True)``: ``[S, experts]`` each.

        Raises:
            NotImplementedError: if the family does not return them.
        """
        given = getattr(output, "router_logits", None)
        if not isinstance(given, tuple) or not given:
            raise NotImplementedError(
                f"{type(self.model).__name__} does not return its router logits: set router_aux_loss_coef to 0 to train "
                "without the auxiliary loss"
            )
        return given

    @property
    def experts_per_token(self) -> int:
        """Experts that a router chooses for a token."""
        return self.model.config.get_text_config().num_experts_per_tok

    @property
    def classifies(self) -> bool:
        """Whether the head is a sequence classifier's, over labels and not over the vocabulary."""
        return has_score_head(self.model)

    def scores(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """A sequence classifier's scores for hidden states ``[N, hidden]``: ``[N, labels]``."""
        return cast(torch.nn.Linear, self.model.score)(hidden_NH)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The family's own logits for hidden states ``[N, hidden]``, scaled and soft-capped as it does: ``[N, vocab]``.

        The model's forward pass runs with its backbone replaced by these hidden states, so that whatever a family does
        between backbone and logits is done here too, by its own code.
        """
        placeholder = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        extra = {"output_router_logits": False} if takes(self.model, "output_router_logits") else {}
        with (
            forward_replaced(self.backbone, lambda *_, **__: _HiddenStates(last_hidden_state=hidden_NH[None])),
            adding_where_they_lie(self.model.get_output_embeddings()),
        ):
            # (`squeeze`, not `[0]`: the gradient of an element is a tensor of zeros and a copy.)
            return self.stock_forward(input_ids=placeholder, use_cache=False, **extra).logits.squeeze(0)

    def end_logits(self) -> None:
        """Ends a pass that has called `logits` several times.

        FSDP2 before torch 2.13 counts which modules of a group (the last norm and the head) have still to run, and begins anew
        with each call of the head: it goes on to wait for the norm, and would not gather the group's weights in the next pass
        if something, as saving does, shares them out in between. A backward pass puts the count right.
        """
        state = getattr(self.model.get_output_embeddings(), "_get_fsdp_state", None)
        if state is not None and _FSDP_COUNTS_MODULES and not torch.is_grad_enabled():
            state()._modules_to_run_forward.clear()


def _rows(table: Any) -> int:
    """Of a table's weights, which ZeRO-3 may have shared out."""
    return getattr(table.weight, "ds_shape", table.weight.shape)[0]


def _embedded_at(embeddings: list[torch.nn.Module], positions: torch.Tensor) -> AbstractContextManager[None]:
    """While inside, these embeddings of positions, which count them by themselves, give those of others."""

    def place(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"position_ids": positions}

    return hooked(part.register_forward_pre_hook(place, with_kwargs=True) for part in embeddings)


class _HiddenStates(BaseModelOutputWithPast):
    """A backbone's output that has None for whatever else a family's output class holds (router logits, ...)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def has_score_head(model: PreTrainedModel) -> bool:
    """Whether it is one of transformers' sequence classifiers on a decoder: a linear `score` in place of the output head."""
    return model.get_output_embeddings() is None and isinstance(getattr(model, "score", None), torch.nn.Module)


def takes(model: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _num_layers(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1


def _find_backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The part whose hidden states the model's forward pass hands to the head: found by watching what it calls."""
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    candidates: list[Any] = [part for part in (model.base_model, model.get_decoder(), *parts) if part is not model]
    called: list[torch.nn.Module] = []
    hooks = (part.register_forward_pre_hook(lambda module, _: called.append(module)) for part in candidates)
    with hooked(hooks), in_evaluation(model), torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device))
    for candidate in candidates:
        if candidate in called:
            return candidate
    raise NotImplementedError("no part of its forward pass can be told apart as the backbone before the output head")


def _decoder_of(model: PreTrainedModel, backbone: torch.nn.Module) -> torch.nn.Module:
    """The part of a backbone that runs on embeddings of tokens, those of images among them; without one, the backbone."""
    decoder = model.get_decoder()
    inside = isinstance(decoder, torch.nn.Module) and any(part is decoder for part in backbone.modules())
    return decoder if inside else backbone


def below_peft(model: Any) -> Any:
    """What PEFT has wrapped, or None. (transformers models have a `peft_config` of their own, hence the second look.)"""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None


def prepared_part(model: torch.nn.Module) -> PreparedModel | None:
    """What `prepare_model` attached to ``model`` (also when wrapped by PEFT, DDP or accelerate), or None."""
    while True:
        if (prepared := getattr(model, ATTRIBUTE, None)) is not None:
            return prepared
        inner: Any = getattr(model, "module", None) or below_peft(model)
        if not isinstance(inner, torch.nn.Module) or inner is model:
            return None
        model = inner
