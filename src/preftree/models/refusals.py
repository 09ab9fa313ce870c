"""Settings that tree attention cannot reproduce exactly, recognised before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from preftree.models.prepared import has_score_head
from preftree.models.rotary import rotary_limits, rotary_parts

ATTENTION_LAYER_TYPES = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "dense",
    "sparse",
    "moe",
}
_DROPOUT = re.compile(r"drop(out)?($|_p$|_prob$|_rate$)|dropout$|pdrop$|layerdrop$")


def active_dropout(model: torch.nn.Module) -> Iterator[tuple[str, str, float]]:
    """Every dropout above zero: ``(module name, attribute, probability)``."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            if module.p:
                yield name, "p", module.p
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, float) and value > 0 and _DROPOUT.search(attribute):
                yield name, attribute, value


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of the model to zero: dropout modules, and probabilities that layers keep as numbers."""
    for name, attribute, _ in list(active_dropout(model)):
        setattr(model.get_submodule(name), attribute, 0.0)


def switched_on_since(model: PreTrainedModel) -> str | None:
    """What rules sharing out though `find_refusal` once found nothing: trainers and adapters change a model later."""
    for name, attribute, probability in active_dropout(model):
        if model.get_submodule(name).training:
            return f"dropout ({name or 'model'}.{attribute} = {probability})"
    embeddings = model.get_input_embeddings()
    if embeddings.training and getattr(embeddings, "neftune_noise_alpha", None):
        return "NEFTune noise"
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and any(getattr(a, "alora_invocation_tokens", None) for a in adapters.values()):
        return "alora_invocation_tokens (activated LoRA)"
    return None


def _rotary_refusal(model: PreTrainedModel) -> tuple[str, str] | None:
    """Of frequencies that change with a sequence's length otherwise than `rotary.by_length` follows."""
    parts = list(rotary_parts(model))
    try:
        limits = rotary_limits(model.config)
    except ValueError as error:
        return str(error), "sequences of a batch change each other"
    if not parts and not limits:
        return None
    setting = f"rope_type={next((limit.rope_type for limit in limits), 'dynamic or longrope')!r}"
    within = {
        part for module in model.modules() if isinstance(module, torch.nn.ModuleList) for part in module.modules()
    }
    if len(limits) != 1 or not parts or not within.isdisjoint(parts):
        return setting, (
            "its frequencies change with a sequence's length in a way of this family's own: packed sequences would change "
            "each other"
        )
    if hasattr(model.config, "vision_config"):
        return setting, "its frequencies change with the largest position, which images count otherwise than text"
    return None


def find_refusal(model: PreTrainedModel) -> tuple[str, str] | None:
    """``(setting, reason)`` of the first setting that rules tree attention out, or None."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        return "is_encoder_decoder", "the prompt goes through an encoder, whose attention is not causal"
    if getattr(config, "is_causal", True) is False:
        return "is_causal=False", "attention in both directions makes a prompt depend on its response"
    if model.get_output_embeddings() is None and not has_score_head(model):
        return "no output head", (
            "log-probabilities need a causal language model with a head over the vocabulary, rewards a sequence classifier"
        )
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(places) > 1:
        return f"device_map (over {', '.join(places)})", (
            "a row lies on one device. Load it on one (CUDA_VISIBLE_DEVICES shows a process one GPU), start a process for "
            "each GPU with torchrun or accelerate launch, and shard weights that are too large for one with FSDP"
        )
    if (rotary := _rotary_refusal(model)) is not None:
        return rotary
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        # transformers before 5.18 leaves the cap out in silence there; later versions raise.
        return "attn_implementation='sdpa' with attn_logit_softcapping", (
            "SDPA has no soft cap, so the stock model itself computes something else; load it with "
            "attn_implementation='eager'"
        )
    if (threshold := _outlier_threshold(model)) > 0:
        return f"llm_int8_threshold={threshold}", (
            "which columns of activations are kept in half precision depends on all tokens of a batch: a sequence's "
            "numbers are others alone than next to others, in the stock model too. Load it with llm_int8_threshold=0.0"
        )
    for name, attribute, probability in active_dropout(model):
        return (
            f"dropout ({name or 'model'}.{attribute} = {probability})",
            "a shared prefix would get one dropout mask where separate sequences get several; set it to 0",
        )
    return None


def _outlier_threshold(model: PreTrainedModel) -> float:
    """Above which LLM.int8() (arXiv 2208.07339, section 3.2) keeps columns of activations apart; 0 if it does not."""
    settings: Any = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return float(settings.llm_int8_threshold) if getattr(settings, "load_in_8bit", False) else 0.0


def other_layer_types(config: PreTrainedConfig) -> str | None:
    """The kinds of layers that are not attention and so read a row in its order, and that they do; None without any."""
    others = ", ".join(sorted(set(other_layers(config))))
    return f"layer types {others}: layers that are not attention read the row in its order" if others else None


def other_layers(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer that is not attention."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return [kind for kind in kinds if kind not in ATTENTION_LAYER_TYPES]


def read_by_index(model: PreTrainedModel) -> str | None:
    """The first setting that lets attention compute by a token's index in the row, and what does; or None.

    A run on a small row need not show it: scales that grow with the index may begin to at some thousand tokens.
    """
    config = model.config.get_text_config()
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):
        return "alibi: its biases are computed from row indices, not from positions in the sequence"
    if any(
        getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True)
        for module in model.modules()
    ):
        return "attn_temperature_tuning: its query scales are computed from row indices"
    if getattr(config, "index_topk", None):
        return "index_topk: an indexer selects keys by their index in the row"
    return None
