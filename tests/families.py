"""Tiny random models of many families, each with what makes it special switched on (windows shorter than the text)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

VOCABULARY = 131
_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    # Large weights make the attention sharp: a wrong mask shows.
    "initializer_range": 0.2,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

_LLAMA4 = {
    "head_dim": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0, 1],
    "attention_chunk_size": 8,
}

# name: (family prefix of the transformers classes, settings on top of _SIZE)
EXACT: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "layer_types": _MIXED,
        },
    ),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": _MIXED}),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-scaled": ("GPT2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": (
        "GPTNeoX",
        {
            "hidden_dropout": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "cohere2": ("Cohere2", {"sliding_window": 4, "layer_types": _MIXED, "logit_scale": 0.7}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen3_moe": ("Qwen3Moe", _MOE | {"num_experts": 4, "head_dim": 8}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4, "layer_types": _MIXED},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _MOE
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    "llama4-chunks": ("Llama4", _LLAMA4 | {"attn_temperature_tuning": False}),
    "granite": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.5}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
}

# name: (family prefix, settings, what the error must name)
REFUSED: dict[str, tuple[str, dict, str]] = {
    "dynamic-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
    "longrope": (
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
        },
        "longrope",
    ),
    "dropout": ("GPT2", _GPT2 | {"resid_pdrop": 0.1}, "dropout"),
    "attention-dropout": ("Llama", {"attention_dropout": 0.1}, "dropout"),
    "router-noise": ("Mixtral", _MOE | {"router_jitter_noise": 0.1}, "in training its forward pass is random"),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}, "position_ids"),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "alibi"),
    "falcon": ("Falcon", {"hidden_dropout": 0.0, "alibi": True}, "alibi"),
    "falcon-rope": ("Falcon", {"hidden_dropout": 0.0, "alibi": False}, "attention code of their own"),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}, "attention code of their own"),
    "codegen": ("CodeGen", _GPT2 | {"rotary_dim": 4}, "attention code of their own"),
    "mamba": ("Mamba", {"state_size": 4}, "linear_attention"),
    "qwen3_next": (
        "Qwen3Next",
        _MOE
        | {
            "num_experts": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        "linear_attention",
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    "llama4-temperature": ("Llama4", _LLAMA4, "attn_temperature_tuning"),
    "bert-encoder": ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "not causal"),
}
_HEADS = {"GPT2": "GPT2LMHeadModel", "Bert": "BertLMHeadModel"}
_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}


def build(
    family: str, settings: dict, seed: int = 0, head: str = "CausalLM", **loading
) -> transformers.PreTrainedModel:
    """A model of the family with random weights, in float32 and evaluation mode."""
    config_class = getattr(transformers, _CONFIGS.get(family, f"{family}Config"))
    own = config_class()
    sizes = {name: value for name, value in _SIZE.items() if hasattr(own, name)}
    if "attn_logit_softcapping" in settings:
        loading.setdefault("attn_implementation", "eager")
    torch.manual_seed(seed)
    name = _HEADS.get(family, f"{family}ForCausalLM") if head == "CausalLM" else f"{family}For{head}"
    model_class = getattr(transformers, name, None) or getattr(transformers, name.replace("For", "TextFor"))
    model = model_class._from_config(config_class(**(sizes | settings)), **loading).float().eval()
    # Norms and biases start at one and zero, which hides what they would add: shake everything a little.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def exact_model(name: str, seed: int = 0, size: int | None = None, **loading) -> transformers.PreTrainedModel:
    """A family of `EXACT`; ``size`` asks for heads of that size, for kernels that take no smaller ones."""
    family, settings = EXACT[name]
    if size is not None:
        sized = {"hidden_size": 4 * size, "head_dim": size} if "n_embd" not in settings else {"n_embd": 4 * size}
        if "qk_rope_head_dim" in settings:
            sized = {"qk_rope_head_dim": size, "qk_nope_head_dim": size, "v_head_dim": size}
        settings = settings | sized
    return build(family, settings, seed=seed, **loading)


def refused_model(name: str) -> tuple[Callable[[], transformers.PreTrainedModel], str]:
    family, settings, expected = REFUSED[name]
    return lambda: build(family, settings), expected
