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
    # Counts positions from behind its padding token's.
    "roberta": (
        "Roberta",
        {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1},
    ),
    "bart": (
        "Bart",
        {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0},
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
}

# (Of heads as many as causal_conv1d's kernels take: widths of projections divisible by 8.)
_SSM = {
    "mamba_d_state": 4,
    "mamba_d_conv": 3,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}

# Parts of their layers run along paths. name: (family prefix, settings on top of _SIZE, how many parts do, of how many).
ALONG_PATHS: dict[str, tuple[str, dict, tuple[int, int]]] = {
    "mamba": ("Mamba", {"state_size": 4}, (3, 3)),
    "mamba2": (
        "Mamba2",
        {"expand": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        (3, 3),
    ),
    "falcon_mamba": ("FalconMamba", {"state_size": 4}, (3, 3)),
    "jamba": (
        "Jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        (2, 3),
    ),
    "bamba": ("Bamba", _SSM | {"attn_layer_indices": [1]}, (2, 3)),
    "falcon_h1": ("FalconH1", _SSM | {"mamba_d_ssm": 64, "head_dim": 8}, (3, 6)),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _SSM
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
        (2, 3),
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
        },
        (1, 2),
    ),
    "zamba2": (
        "Zamba2",
        {
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "attention_head_dim": 16,
            "kv_channels": 8,
        },
        (3, 4),
    ),
    "qwen3_next": (
        "Qwen3Next",
        _MOE
        | _LINEAR
        | {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 24, "initializer_range": 0.15},
        (2, 3),
    ),
    "qwen3_5": ("Qwen3_5", _LINEAR | {"head_dim": 8}, (2, 3)),
    "olmo_hybrid": ("OlmoHybrid", _LINEAR, (2, 3)),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, (2, 3)),
    "minimax": (
        "MiniMax",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
        },
        (2, 3),
    ),
    "kimi_linear": (
        "KimiLinear",
        _MOE
        | {
            "num_local_experts": 4,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "num_heads": 4,
                "head_dim": 8,
                "short_conv_kernel_size": 3,
            },
        },
        (2, 3),
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        (2, 3),
    ),
    # Its time and its channel mixing look back.
    "rwkv": ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}, (6, 6)),
    "falcon-rope": (
        "Falcon",
        {"hidden_dropout": 0.0, "alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True},
        (3, 3),
    ),
    "falcon-alibi": ("Falcon", {"hidden_dropout": 0.0, "alibi": True}, (3, 3)),
    "bloom": ("Bloom", {"n_head": 4, "hidden_dropout": 0.0}, (3, 3)),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4}, (3, 3)),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}, (3, 3)),
    "codegen": ("CodeGen", _GPT2 | {"rotary_dim": 4}, (3, 3)),
    "gpt_neo": (
        "GPTNeo",
        {
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 4,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
        },
        (3, 3),
    ),
    "gpt_neox_japanese": ("GPTNeoXJapanese", {"hidden_dropout": 0.0}, (3, 3)),
    "openai-gpt": ("OpenAIGPT", _GPT2, (3, 3)),
    "xglm": ("XGLM", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "dropout": 0.0}, (3, 3)),
    "llama4-temperature": ("Llama4", _LLAMA4 | {"floor_scale": 4}, (3, 3)),
    "deepseek_v32": (
        "DeepseekV32",
        EXACT["deepseek_v3"][1]
        | {"index_topk": 6, "index_n_heads": 8, "index_head_dim": 8, "first_k_dense_replace": 3},
        (3, 3),
    ),
    # Hands what it selects on to the next layer: as many places as the longest sequence has.
    "glm_moe_dsa": (
        "GlmMoeDsa",
        EXACT["deepseek_v3"][1]
        | {"index_topk": 100, "index_n_heads": 8, "index_head_dim": 8, "first_k_dense_replace": 3},
        (3, 3),
    ),
}

# name: (family prefix, settings, what the error must name)
REFUSED: dict[str, tuple[str, dict, str]] = {
    "dropout": ("GPT2", _GPT2 | {"resid_pdrop": 0.1}, "dropout"),
    "attention-dropout": ("Llama", {"attention_dropout": 0.1}, "dropout"),
    "router-noise": ("Mixtral", _MOE | {"router_jitter_noise": 0.1}, "in training its forward pass is random"),
    "xlm": (
        "XLM",
        {"causal": True, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "dropout": 0.0},
        "attention code of their own",
    ),
    "bert-encoder": ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "not causal"),
}
_HEADS = {
    "GPT2": "GPT2LMHeadModel",
    "Bert": "BertLMHeadModel",
    "OpenAIGPT": "OpenAIGPTLMHeadModel",
    "XLM": "XLMWithLMHeadModel",
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig", "Qwen3_5": "Qwen3_5TextConfig"}


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
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if name.endswith("A_log"):  # what forgets within a token says nothing of tokens before it, but rounding
                parameter.clamp_(max=-1.0)
    return model


def exact_model(name: str, seed: int = 0, size: int | None = None, **loading) -> transformers.PreTrainedModel:
    """A family of `EXACT` or `ALONG_PATHS`; ``size`` asks for heads of that size, for kernels that take no smaller ones."""
    family, settings, *_ = EXACT.get(name) or ALONG_PATHS[name]
    if size is not None:
        sized = {"hidden_size": 4 * size, "head_dim": size} if "n_embd" not in settings else {"n_embd": 4 * size}
        if "qk_rope_head_dim" in settings:
            sized = {"qk_rope_head_dim": size, "qk_nope_head_dim": size, "v_head_dim": size}
        settings = settings | sized
    return build(family, settings, seed=seed, **loading)


def saved_model(name: str, path, tokenizer, **settings) -> str:
    """A family's model and a tokenizer in a folder."""
    family, own = EXACT[name]
    build(family, own | {"vocab_size": len(tokenizer), "eos_token_id": 1} | settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def refused_model(name: str) -> tuple[Callable[[], transformers.PreTrainedModel], str]:
    family, settings, expected = REFUSED[name]
    return lambda: build(family, settings), expected
