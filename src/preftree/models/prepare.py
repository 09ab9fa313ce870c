"""`prepare_model`: a transformers model that also runs packed rows of trees, or an error that says why it cannot."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from preftree.attention import check_backend
from preftree.models import interface, mixers
from preftree.models.compiled import check_memory_budget, compile_layers, hinders_compiling, worth_compiling
from preftree.models.prepared import ATTRIBUTE, PreparedModel, below_peft, prepared_part, takes
from preftree.models.refusals import find_refusal, other_layer_types, read_by_index
from preftree.models.replaced import in_evaluation
from preftree.models.twins import NotTiny, is_twin, torch_code, twin_of
from preftree.models.verify import (
    cut_as_twin,
    cut_last_layer,
    first_position,
    small_batch,
    small_row,
    verify_images,
    verify_on_tree,
)
from preftree.packing import PackedRow

# Of a model that tree attention is under: an `_Attached`.
_ATTACHED = "_preftree_attached"
_REFUSED = " cannot share prefixes exactly: "


def _tree_aware(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    # Keeps the stock signature, which `generate` and `Trainer` read. Holds no model in a closure: a deep copy of a
    # prepared model must run its own weights.
    @functools.wraps(stock_forward)
    def forward(self, *args, on_tree: Callable[[PreparedModel], Any] | None = None, **kwargs):
        prepared = getattr(self, ATTRIBUTE)
        if on_tree is None:
            return prepared.plain_forward(*args, **kwargs)
        # A compiled wrapper (`torch_compile=True`) runs this part as it is: rows are bound in Python, call by call.
        return torch.compiler.disable(on_tree)(prepared) if torch.compiler.is_compiling() else on_tree(prepared)

    return forward


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model below PEFT's wrapper."""
    if (below := below_peft(model)) is not None:
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
        raise TypeError(f"expected a transformers model or a PEFT model around one, got {type(model).__name__}")
    return model


def _serves_eagerly(model: PreTrainedModel, implementation: str | None) -> bool:
    """Whether ordinary batches go through the family's eager attention (else through SDPA) once it is prepared."""
    if implementation in ("sdpa", interface.OVER_SDPA):
        return False
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return implementation in ("eager", interface.OVER_EAGER) or not model._supports_sdpa or bool(capped)


def _restore_attention(base: PreTrainedModel, implementation: str | None) -> None:
    """Give ``base`` back the attention it had, unless it has got another one since."""
    if base.config._attn_implementation not in (interface.OVER_SDPA, interface.OVER_EAGER):
        return
    if implementation in (None, "eager", "sdpa") or "flash" in implementation or "flex" in implementation:
        base.set_attn_implementation(implementation or "eager")


@dataclass(frozen=True)
class _Attached:
    """What `attach_tree_attention` has made of a model; its attention before and since, by name."""

    prepared: PreparedModel
    before: str | None
    since: str | None


def detach_tree_attention(base: PreTrainedModel) -> None:
    """Undo `attach_tree_attention`, for all who use it."""
    if (attached := vars(base).pop(_ATTACHED, None)) is not None:
        mixers.restore(attached.prepared.along_paths)
        _restore_attention(base, attached.before)


def attach_tree_attention(base: PreTrainedModel, backend: str, verify: bool = True) -> PreparedModel:
    """Put tree attention under ``base``, whose ordinary batches run as before; a model that is refused stays as it was.

    Done once: whoever comes later, to prepare a model that shares or the other way round, gets what was found then. Of a model
    whose weights are elsewhere (see `weights_elsewhere`) a tiny random twin is tried.

    Raises:
        NotImplementedError: if the family or a setting cannot be computed exactly, naming family, setting and reason.
        ValueError: for weights that give no finite hidden states.
    """
    attached: _Attached | None = vars(base).get(_ATTACHED)
    if attached is not None and base.config._attn_implementation == attached.since:
        return attached.prepared.again(backend)
    detach_tree_attention(base)
    implementation = base.config._attn_implementation
    try:
        _check(base, verify)
        _keep_gradients(base)
        twin = _tried_twin(base, verify) if weights_elsewhere(base) else None
        prepared = PreparedModel(base, backend, twin)
        base.set_attn_implementation(
            interface.OVER_EAGER if _serves_eagerly(base, implementation) else interface.OVER_SDPA
        )
        if twin is None:
            _follow_the_tree(prepared, verify)
        else:
            _follow_the_tree_as(prepared, twin)
        prepared.try_images = verify_images if verify else None
    except Exception as error:
        _restore_attention(base, implementation)
        if isinstance(error, NotImplementedError):
            family = f"{type(base).__name__} (model_type {base.config.model_type!r})"
            raise NotImplementedError(f"{family}{_REFUSED}{error}") from error
        raise
    vars(base)[_ATTACHED] = _Attached(prepared, implementation, base.config._attn_implementation)
    return prepared


def reason_of(error: NotImplementedError) -> str:
    """What `attach_tree_attention` refused a model for, without the family's name."""
    return str(error).partition(_REFUSED)[2] or str(error)


def _check(base: PreTrainedModel, verify: bool) -> None:
    """Raise `NotImplementedError` for a model that is refused before anything is changed."""
    if (refusal := find_refusal(base)) is not None:
        raise NotImplementedError(": ".join(refusal))
    if verify:
        from preftree.families.selftest import what_is_wrong  # which prepares models itself

        if (wrong := what_is_wrong(base)) is not None:
            raise NotImplementedError(wrong)
    for argument in ("input_ids", "attention_mask"):
        if not takes(base, argument):
            raise NotImplementedError(f"its forward pass takes no {argument}, which a row is given by")


def _keep_gradients(base: PreTrainedModel) -> None:
    """Keep bitsandbytes' 4-bit layers from packing their weights anew at the first evaluation on some CPUs.

    What they compute from such weights has no gradient, even when training goes on, and without a word.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _follow_the_tree(prepared: PreparedModel, verify: bool) -> None:
    """Let each part of the layers that mixes tokens do so by the tree: through the row's mask, or along its paths.

    Raises:
        NotImplementedError: if the result is not the stock model's, and why.
    """
    reason: Any = None
    prepared.first_position = first_position(prepared) if prepared.takes_positions else 0
    other_kinds, by_index = other_layer_types(prepared.model.config), read_by_index(prepared.model)
    told = other_kinds or by_index
    if told is None:
        try:
            prepared.rounding = verify_on_tree(prepared) if verify else None
            return
        except NotImplementedError as error:
            reason = error
    with in_evaluation(prepared.model):
        mixing = prepared.mixing = _find_mixers(prepared, _places_that_mix(prepared.model))
        try:
            lost = mixers.find_lost(mixing, lambda: prepared.hidden_states(small_row(prepared)))
        except Exception as error:  # a family whose code cannot take a row fails in its own way
            raise NotImplementedError(
                str(reason or f"its forward pass fails on a row of trees ({type(error).__name__}: {error})")
            ) from error
    # What reads indices where a small row does not show it could be in any part.
    for parts in [mixing] if by_index is not None and other_kinds is None else [lost, mixing]:
        if not parts:
            continue
        mixers.run_along_paths(parts)
        prepared.along_paths = parts
        try:
            prepared.rounding = verify_on_tree(prepared)
            kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
            warnings.warn(
                f"{type(prepared.model).__name__}: {kinds} run along each path of a row, exactly, but what mixes tokens in "
                f"them computes a prompt once for each response; products with weights are shared ({told or reason})",
                UserWarning,
                stacklevel=4,
            )
            return
        except NotImplementedError as error:
            mixers.restore(parts)
            prepared.along_paths = []
            reason = reason or error
    raise NotImplementedError(str(reason) if told is None else f"{told} (along its paths: {reason})")


def weights_elsewhere(model: PreTrainedModel) -> bool:
    """Whether this process does not hold a model's weights: ZeRO-3 shares them out as they are loaded, and with FSDP's
    `cpu_ram_efficient_loading` one rank alone loads them (all ranks must find the same, so that it counts for that one, too).
    """
    shared = is_deepspeed_zero3_enabled() or is_fsdp_enabled() or any(each.is_meta for each in model.parameters())
    return shared and not is_twin(model)


def _tried_twin(base: PreTrainedModel, verify: bool) -> PreparedModel:
    """A tiny model with random weights, prepared: what is found of it holds for the model, whose weights are elsewhere."""
    try:
        with torch_code():
            like = attach_tree_attention(twin_of(base), "auto", verify)
            if like.rounding is not None:
                cut_last_layer(like, like.rounding)
    except NotTiny as error:
        raise NotImplementedError(
            "its weights may not be in this process (DeepSpeed ZeRO-3, or FSDP's cpu_ram_efficient_loading, which can be "
            f"switched off), and no tiny model can be made to be tried in its place ({error})"
        ) from error
    except NotImplementedError as error:
        raise NotImplementedError(reason_of(error)) from error
    if like.first_position and like.model.config.pad_token_id != base.config.pad_token_id:
        raise NotImplementedError(
            "it counts positions from behind its padding token's, and its weights may not be in this process (DeepSpeed "
            "ZeRO-3, or FSDP's cpu_ram_efficient_loading, which can be switched off)"
        )
    return like


def _follow_the_tree_as(prepared: PreparedModel, like: PreparedModel) -> None:
    """Let the parts of the layers mix tokens as those of the twin do."""
    prepared.first_position, prepared.paths_together = like.first_position, like.paths_together
    prepared.mixing = mixers.at_places(prepared.layers, mixers.places_of(like.layers, like.mixing))
    prepared.along_paths = mixers.at_places(prepared.layers, mixers.places_of(like.layers, like.along_paths))
    mixers.run_along_paths(prepared.along_paths)


def _find_mixers(prepared: PreparedModel, known: Collection[mixers.Place] = ()) -> list[torch.nn.Module]:
    return mixers.find_mixers(prepared.layers, lambda: prepared.stock_forward(**small_batch(prepared)), known)


def _places_that_mix(model: PreTrainedModel) -> set[mixers.Place]:
    """As a tiny model with random weights shows: those of a model that begins to be trained may be zeros, which hides it."""
    if is_twin(model):
        return set()
    try:
        with torch_code():
            tiny = PreparedModel(twin_of(model), "dense")
            return mixers.places_of(tiny.layers, _find_mixers(tiny))
    except Exception:  # no such model, or not one that runs as it is
        return set()


def prepare_model(
    model: torch.nn.Module,
    backend: str = "auto",
    verify: bool = True,
    compile: bool | None = False,
    activation_memory_budget: float = 1.0,
    device: torch.device | str | None = None,
) -> torch.nn.Module:
    """Let a transformers causal language model run packed rows of trees (see `preftree.sequence_logps`).

    The model is changed in place: its attention goes through functions registered with transformers, which for ordinary
    batches do what it did before. Generation, scoring, saving and loading work as before. Calling it again only changes
    the backend, and compiles layers that were not.

    Parts of layers that mix tokens otherwise than by attention through transformers' interface (recurrences, convolutions,
    attention code of a family's own, biases by index) run along each path of a row, as on sequences alone; a warning names
    them, since of what they compute only products with weights are shared.

    Args:
        model: a `PreTrainedModel` with a language-modelling head (or a sequence classifier, for rewards), or a PEFT model
            around one.
        backend: "auto" chooses by device, layer and row; "flash" is FlashAttention-4 with the tree's mask (Hopper),
            "flex" FlexAttention (GPU), "varlen" goes path by path, "dense" is the specification.
        verify: run a tree of some thirty tokens through the model and compare with the stock model on each of its
            sequences alone. Takes a few short forward passes. Of a family that `docs/families.md` does not list as exact, a
            tiny random model is tried before, once for each release of transformers. Images are tried on the first row that
            holds some, in the same way.
        compile: run the decoder layers of rows under `torch.compile`, one compilation for all lengths. None: where that pays,
            on a GPU; layers that cannot be compiled then run as they are, with a warning.
        activation_memory_budget: share of what a compiled layer would keep for its backward pass that it may keep, from 0 to
            1; the rest is computed again there, what takes least operations first.
        device: where rows will run, if the weights are not there yet (they go to their GPUs when they are sharded).

    Returns:
        The same model.

    Raises:
        NotImplementedError: if the family or a setting cannot be computed exactly, naming family, setting and reason.
        ValueError: for an unknown backend, a budget outside 0 to 1, or weights that give no finite log-probabilities.
    """
    base = base_model(model)
    if compile and (hindrance := hinders_compiling(base)) is not None:
        raise NotImplementedError(f"compiled layers with {hindrance}: leave them uncompiled, or shard with FSDP")
    device = base.device if device is None else torch.device(device)
    check_backend(backend, device)
    check_memory_budget(activation_memory_budget)
    if (prepared := getattr(base, ATTRIBUTE, None)) is None:
        # Tried where the weights are, by a backend that runs there.
        prepared = attach_tree_attention(base, backend if device.type == base.device.type else "auto", verify)
        if prepared.twin_cuts:
            cut_as_twin(prepared)
        elif prepared.rounding is not None:
            cut_last_layer(prepared, prepared.rounding)
        setattr(base, ATTRIBUTE, prepared)
        base.forward = MethodType(_tree_aware(type(base).forward), base)
    prepared.backend = backend
    if compile or (compile is None and worth_compiling(base, device)):
        compile_layers(base, compile is None, activation_memory_budget)
    return model


def ready_to_run(model: torch.nn.Module, row: PackedRow) -> tuple[PreparedModel, PackedRow]:
    """What is prepared in a model (prepared now, if it is not), and the row on its device.

    Raises:
        NotImplementedError: if the model cannot share prefixes exactly.
        ValueError: for token ids outside the model's vocabulary.
    """
    prepared = prepared_part(model) or prepared_part(prepare_model(model))
    if prepared is None:
        raise TypeError(f"{type(model).__name__} hides the model that it wraps: prepare_model that one first")
    if row.device.type == "cpu":
        # (On a GPU, asking would make it wait at every step.)
        highest = int(row.input_ids.max()) if len(row) else 0
        if highest >= prepared.vocabulary_size:
            raise ValueError(f"token id {highest} is outside the model's vocabulary of {prepared.vocabulary_size}")
    return prepared, row.to(_runs_on(next(model.parameters())))


def _runs_on(weight: torch.nn.Parameter) -> torch.device:
    """Where products with a weight are computed: FSDP2 may keep its share on the CPU meanwhile."""
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else torch.device(mesh.device_type)
