"""`prepare_model`: a transformers model that also runs packed rows of trees, or an error that says why it cannot."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from preftree.attention import choose_backend
from preftree.models import interface
from preftree.models.refusals import find_refusal
from preftree.packing import PackedRow

_ATTRIBUTE = "_preftree"


class PreparedModel:
    """The two halves of a prepared causal language model, for code that runs inside its forward pass.

    Attributes:
        model: the transformers model itself (below PEFT's wrapper, if any).
        backend: attention backend as the user named it ("auto", "dense", "flex", "varlen").
    """

    def __init__(self, model: PreTrainedModel, backend: str):
        self.model = model
        self.backend = backend
        self.stock_forward: Callable[..., Any] = MethodType(type(model).forward, model)
        # What others (TRL, accelerate) may have put in its place on this instance.
        self.plain_forward: Callable[..., Any] = model.__dict__.get("forward", self.stock_forward)
        self.backbone = _find_backbone(model)
        self.attention_layers = _num_layers(model)

    @property
    def device(self) -> torch.device:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.device

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.dtype

    @property
    def vocabulary_size(self) -> int:
        """Token ids that the model can both read and score."""
        read = cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        return min(read, cast(torch.nn.Linear, self.model.get_output_embeddings()).weight.shape[0])

    def hidden_states(self, row: PackedRow) -> torch.Tensor:
        """Final hidden states of a row, ``[S, hidden]`` (see `run`)."""
        return self.run(row).last_hidden_state[0]

    def run(self, row: PackedRow, **options: Any) -> Any:
        """The backbone's output for a row; ``options`` are passed to its forward pass.

        Raises:
            NotImplementedError: if a layer does not attend through the tree.
        """
        device = row.device
        backend = choose_backend(self.backend, device)
        with interface.activate(row, backend) as active:
            output = self.backbone(
                input_ids=row.input_ids[None],
                attention_mask=torch.ones(1, len(row), dtype=torch.long, device=device),
                position_ids=row.position_ids[None],
                use_cache=False,
                **options,
            )
        if active.attention_calls < self.attention_layers:
            raise NotImplementedError(
                f"{active.attention_calls} of its {self.attention_layers} layers attend through transformers' "
                "attention interface; the others have attention code of their own, or mix tokens by other means"
            )
        return output

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

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The family's own logits for hidden states ``[N, hidden]``, scaled and soft-capped as it does: ``[N, vocab]``.

        The model's forward pass runs with its backbone replaced by these hidden states, so that whatever a family does
        between backbone and logits is done here too, by its own code.
        """
        own = self.backbone.__dict__.get("forward")
        self.backbone.forward = lambda *args, **kwargs: _HiddenStates(last_hidden_state=hidden_NH[None])
        try:
            placeholder = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
            extra = {"output_router_logits": False} if _takes(self.model, "output_router_logits") else {}
            return self.stock_forward(input_ids=placeholder, use_cache=False, **extra).logits[0]
        finally:
            if own is None:
                del self.backbone.forward
            else:
                self.backbone.forward = own


class _HiddenStates(BaseModelOutputWithPast):
    """A backbone's output that has None for whatever else a family's output class holds (router logits, ...)."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters


def _num_layers(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 1


def _find_backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The part whose hidden states the model's forward pass hands to the head: found by watching what it calls."""
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    candidates: list[Any] = [part for part in (model.base_model, model.get_decoder(), *parts) if part is not model]
    called: list[torch.nn.Module] = []
    hooks = [part.register_forward_pre_hook(lambda module, _: called.append(module)) for part in candidates]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for candidate in candidates:
        if candidate in called:
            return candidate
    raise NotImplementedError("no part of its forward pass can be told apart as the backbone before the output head")


def _tree_aware(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    # Keeps the stock signature, which `generate` and `Trainer` read. Holds no model in a closure: a deep copy of a
    # prepared model must run its own weights.
    @functools.wraps(stock_forward)
    def forward(self, *args, on_tree: Callable[[PreparedModel], Any] | None = None, **kwargs):
        prepared = getattr(self, _ATTRIBUTE)
        if on_tree is None:
            return prepared.plain_forward(*args, **kwargs)
        # A compiled wrapper (`torch_compile=True`) runs this part as it is: rows are bound in Python, call by call.
        return torch.compiler.disable(on_tree)(prepared) if torch.compiler.is_compiling() else on_tree(prepared)

    return forward


def _below_peft(model: Any) -> Any:
    """What PEFT has wrapped, or None. (transformers models have a `peft_config` of their own, hence the second look.)"""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None


def _base(model: Any) -> PreTrainedModel:
    """The transformers model below PEFT's wrapper."""
    if (below := _below_peft(model)) is not None:
        for config in model.peft_config.values():
            if getattr(config, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"PEFT method {config.peft_type} is not supported: it prepends virtual tokens to every sequence, "
                    "which a row of several sequences has no place for"
                )
            if getattr(config, "alora_invocation_tokens", None):
                raise NotImplementedError(
                    "PEFT setting alora_invocation_tokens (activated LoRA) is not supported: from where the adapter acts "
                    "is found sequence by sequence, which a row of several sequences does not show"
                )
        model = below
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"prepare_model takes a transformers model or a PEFT model around one, got {type(model).__name__}"
        )
    return model


def _serves_eagerly(model: PreTrainedModel, implementation: str | None) -> bool:
    """Whether ordinary batches go through the family's eager attention (else through SDPA) once it is prepared."""
    if implementation in ("sdpa", interface.OVER_SDPA):
        return False
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return implementation in ("eager", interface.OVER_EAGER) or not model._supports_sdpa or bool(capped)


def prepared_part(model: torch.nn.Module) -> PreparedModel | None:
    """What `prepare_model` attached to ``model`` (also when wrapped by PEFT, DDP or accelerate), or None."""
    while True:
        if (prepared := getattr(model, _ATTRIBUTE, None)) is not None:
            return prepared
        inner: Any = getattr(model, "module", None) or _below_peft(model)
        if not isinstance(inner, torch.nn.Module) or inner is model:
            return None
        model = inner


def prepare_model(model: torch.nn.Module, backend: str = "auto", verify: bool = True) -> torch.nn.Module:
    """Let a transformers causal language model run packed rows of trees (see `preftree.sequence_logps`).

    The model is changed in place: its attention goes through functions registered with transformers, which for ordinary
    batches do what it did before. Generation, scoring, saving and loading work as before. Calling it again only changes
    the backend.

    Args:
        model: a `PreTrainedModel` with a language-modelling head, or a PEFT model around one.
        backend: "auto" chooses by device; "dense" is the specification; "flex" FlexAttention (GPU); "varlen" goes run
            by run.
        verify: run a tree of some thirty tokens through the model and compare with the stock model on each of its
            sequences alone. Takes a few short forward passes.

    Returns:
        The same model.

    Raises:
        NotImplementedError: if the family or a setting cannot be computed exactly, naming family, setting and reason.
        ValueError: for an unknown backend, or weights that give no finite log-probabilities.
    """
    base = _base(model)
    choose_backend(backend, base.device)
    if (prepared := getattr(base, _ATTRIBUTE, None)) is not None:
        prepared.backend = backend
        return model
    family = f"{type(base).__name__} (model_type {base.config.model_type!r})"
    if (refusal := find_refusal(base)) is not None:
        setting, reason = refusal
        raise NotImplementedError(f"{family} cannot share prefixes exactly: {setting}: {reason}")
    for argument in ("input_ids", "position_ids", "attention_mask"):
        if not _takes(base, argument):
            raise NotImplementedError(
                f"{family} cannot share prefixes exactly: its forward pass takes no {argument}, so tokens cannot be "
                "placed by their position in the sequence"
            )
    own_forward = base.__dict__.get("forward")
    implementation = base.config._attn_implementation
    name = interface.OVER_EAGER if _serves_eagerly(base, implementation) else interface.OVER_SDPA
    try:
        prepared = PreparedModel(base, backend)
        setattr(base, _ATTRIBUTE, prepared)
        base.forward = MethodType(_tree_aware(type(base).forward), base)
        base.set_attn_implementation(name)
        if verify:
            from preftree.models.verify import verify_on_tree

            verify_on_tree(prepared)
    except Exception as error:
        base.__dict__.pop(_ATTRIBUTE, None)
        if own_forward is None:
            base.__dict__.pop("forward", None)
        else:
            base.forward = own_forward
        if implementation in (None, "eager", "sdpa") or "flash" in implementation or "flex" in implementation:
            base.set_attn_implementation(implementation or "eager")
        if isinstance(error, NotImplementedError):
            raise NotImplementedError(f"{family} cannot share prefixes exactly: {error}") from error
        raise
    return model
