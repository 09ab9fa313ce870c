"""Tiny random models of a family: every size made small, so that what makes the family special remains.

Layers of each kind stay, windows and chunks become shorter than a few dozen tokens, experts are few, dropout is off. Sizes are
told by the names that configurations have for them; what goes by no such name, or must fit something else, is listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed, hub_kernels

VOCABULARY = 131
_LAYERS = 4
_HEADS = 4
# Weights are drawn large enough for attention to be sharp, and small enough for float32 not to round gradients away.
_STANDARD_DEVIATION = 0.1
_SHAKE = 0.05
# A random model that is larger is not made.
_MOST_PARAMETERS = 30_000_000
_MARK = "_preftree_twin"
# Where transformers keeps DeepSpeed's settings.
_DEEPSPEED = "_hf_deepspeed_config_weak_ref"

_NUM_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
)
_NUM_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)
_NUM_GROUPS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
)
_SIZES = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "pronunciation_vocab_size", "shape_vocab_size"),
    32: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim", "lru_width"),
    48: (
        "intermediate_size",
        "intermediate_size_mlp",
        "dense_intermediate_size",
        "shared_intermediate_size",
        "ffn_dim",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "ffn_hidden_size",
        "n_inner",
    ),
    24: (
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
        "shared_expert_intermediate_size",
        "expert_ffn_hidden_size",
    ),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "mamba_d_ssm"),
    16: (
        "q_lora_rank",
        "kv_lora_rank",
        "o_lora_rank",
        "index_n_heads",
        "mamba_d_head",
        "mamba_head_dim",
        "mamba_headdim",
    ),
    12: ("v_head_dim",),
    8: (
        "head_dim",
        "attention_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "global_head_dim",
        "kv_channels",
        "swa_head_dim",
        "swa_v_head_dim",
        "attention_chunk_size",
        "mamba_d_state",
        "state_size",
        "ssm_state_size",
        "mamba_chunk_size",
        "chunk_size",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "index_head_dim",
        "index_topk",
        "block_size",
        "hidden_size_per_layer_input",
    ),
    5: (
        "sliding_window",
        "window_size",
        "swa_window_size",
        "local_attention",
        "attention_window",
        "attention_window_size",
    ),
    4: (
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_moe_experts",
        "mamba_n_heads",
        "mamba_num_heads",
        "n_mamba_heads",
        "time_step_rank",
        "mamba_dt_rank",
        "laurel_rank",
        "rotary_dim",
    ),
    3: (
        "mamba_d_conv",
        "conv_kernel",
        "mamba_conv_kernel",
        "linear_conv_kernel_dim",
        "conv_L_cache",
        "short_conv_kernel_size",
    ),
    2: (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "top_k_experts",
        "moe_topk",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "mamba_expand",
        "eos_token_id",
        "decoder_start_token_id",
    ),
    1: (
        "n_group",
        "topk_group",
        "num_expert_group",
        "num_shared_experts",
        "n_shared_experts",
        "zero_expert_num",
        "mamba_n_groups",
        "n_groups",
        "mamba_ngroups",
        "first_k_dense_replace",
        "num_dense_layers",
        "moe_layer_start_index",
        "bos_token_id",
    ),
    0: ("pad_token_id",),
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names}
_DROPOUT = re.compile(r"drop(out)?($|_p$|_prob$|_rate$)|dropout$|pdrop$|layerdrop$|jitter_noise$")
# Sizes that a class works out from others where they are not given.
_GIVEN_BY_NONE = {"head_dim": 8, "num_key_value_heads": 2}

_HYBRID = ["linear_attention", "full_attention"] * 2
_DECODER = {"is_decoder": True}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 24},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        "layer_types": _HYBRID,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 3,
        },
    },
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"expand": 2, "num_heads": 4, "head_dim": 16},
    "xlm": {"causal": True},
    "xmod": _DECODER | {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "prophetnet",
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
}


class NotTiny(Exception):  # noqa: N818
    """A family of which no tiny model can be made, and why."""


def tiny_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What to make a configuration's class with for a tiny model of its kind."""
    own = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = next((own[name] for name in _NUM_LAYERS if isinstance(own.get(name), int)), None)
    heads = next((own[name] for name in _NUM_HEADS if isinstance(own.get(name), int)), None)
    by_layer = {
        name: list(value) for name, value in own.items() if isinstance(value, (list, tuple)) and len(value) == layers
    }
    kept = _layers_of_each_kind(list(zip(*by_layer.values(), strict=True))) if by_layer else list(range(_LAYERS))
    settings: dict[str, Any] = {name: [value[at] for at in kept] for name, value in by_layer.items()}
    for name, value in own.items():
        if name in settings or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) and _DROPOUT.search(name):
            settings[name] = type(value)(0)
        elif value is None and name in _GIVEN_BY_NONE:
            settings[name] = _GIVEN_BY_NONE[name]
        elif not isinstance(value, int):
            continue
        elif name in _NUM_LAYERS:
            settings[name] = len(kept)
        elif name in _NUM_HEADS:
            settings[name] = _HEADS
        elif name in _NUM_GROUPS:
            settings[name] = 1 if value == 1 else _HEADS if value == heads else 2
        elif name in _SIZE:
            settings[name] = _SIZE[name]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in own:
            settings[name] = _SIZE[name]
    for name in ("initializer_range", "init_std"):
        if name in own:
            settings[name] = _STANDARD_DEVIATION
    return settings | _OWN.get(config.model_type, {})


def _layers_of_each_kind(kinds: list[tuple[Any, ...]]) -> list[int]:
    """Layers such that each kind is there, and not many more."""
    names = [str(kind) for kind in kinds]
    first = [at for at, name in enumerate(names) if name not in names[:at]][:8]
    others = [at for at in range(len(names)) if at not in first]
    return sorted((first + others)[: max(_LAYERS, len(first))])


def twin(model_class: Any, config_class: Any, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a class with random weights, in float32 and evaluation mode.

    Its configuration is made of the sizes alone, so that what the class derives from sizes fits them (`tiny_config`, which
    keeps a model's own settings, keeps what was derived as well).

    Raises:
        NotTiny: if none can be made of this class: its own error, or its size.
    """
    try:
        config = config_class()
        parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
        settings = {
            name: type(part)(**tiny_settings(part))
            for name, part in parts.items()
            if isinstance(part, PreTrainedConfig)
        }
        made = config_class(**(tiny_settings(config) | settings))
        if (wanted := model_class.config_class) is not None and not isinstance(made, wanted):
            made = made.get_text_config()
    except Exception as error:
        raise _not_tiny(error) from error
    return random_model(model_class, made, seed)


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """All of a configuration but its sizes.

    Raises:
        NotTiny: if its class does not take that.
    """
    try:
        given = config.to_dict() | tiny_settings(config)
        for name in getattr(config, "sub_configs", {}):
            if isinstance(part := getattr(config, name, None), PreTrainedConfig):
                given[name] = part.to_dict() | tiny_settings(part)
        for name in ("quantization_config", "_name_or_path", "dtype"):
            given.pop(name, None)
        return type(config).from_dict(given)
    except Exception as error:
        raise _not_tiny(error) from error


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A tiny model with random weights that has all settings of a model but its sizes; as `twin`.

    Raises:
        NotTiny: if none can be made: its class's own error, or its size.
    """
    return random_model(type(model), tiny_config(model.config))


@contextmanager
def torch_code() -> Iterator[None]:
    """While inside, transformers' own code runs where a library for a GPU is installed: tiny models are on the CPU.

    So it does for a model that is exported, which is what asks for it here.
    """
    asked = getattr(hub_kernels, "is_torchdynamo_exporting", None)
    if asked is None:
        yield
        return
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = asked


@contextmanager
def _in_this_process() -> Iterator[None]:
    """While inside, DeepSpeed's ZeRO-3 does not share out the weights of a model that is made."""
    known = vars(deepspeed).get(_DEEPSPEED)
    setattr(deepspeed, _DEEPSPEED, None)
    try:
        yield
    finally:
        setattr(deepspeed, _DEEPSPEED, known)


def is_twin(model: torch.nn.Module) -> bool:
    """Whether this is a tiny random model itself."""
    return getattr(model, _MARK, False)


def random_model(model_class: Any, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, in float32 and evaluation mode.

    Raises:
        NotTiny: if none can be made of this configuration: the class's own error, or its size.
    """
    # With a soft cap, the stock model asks for it (and before transformers 5.18 leaves the cap out in silence).
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    loading = {"attn_implementation": "eager"} if capped else {}
    try:
        with _in_this_process(), torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class._from_config(config, **loading).parameters())
        if size > _MOST_PARAMETERS:
            raise NotTiny(f"its smallest model has {size / 1e6:.0f} M parameters here")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with _in_this_process():
                model = model_class._from_config(config, **loading).float().eval()
            for name, parameter in model.named_parameters():
                # Norms and biases start at one and zero, which hides what they would add.
                parameter.data.add_(_SHAKE * torch.randn_like(parameter))
                if name.endswith("A_log"):  # what forgets within a token says nothing of tokens before it, but rounding
                    parameter.data.clamp_(max=-1.0)
    except NotTiny:
        raise
    except Exception as error:
        raise _not_tiny(error) from error
    setattr(model, _MARK, True)
    return model


def _not_tiny(error: Exception) -> NotTiny:
    return NotTiny(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
