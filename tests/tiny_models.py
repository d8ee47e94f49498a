"""Tiny random checkpoints of every family, made by transformers: the reference that the decoder must reproduce.

The usual initialisation (std 0.02, norms 1, biases 0) would make logits so small that any tolerance admits zeros and
any forgotten bias goes unseen, so every parameter is redrawn at a size that matters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class TinyModel:
    """A transformers architecture and the fields of its config that make it small."""

    architecture: str
    """Prefix of the config class: `Llama` for LlamaConfig."""
    fields: dict[str, Any] = field(default_factory=dict)


# Epsilons a thousand times the usual, so that a model which forgets to read them is noticed.
_COMMON: dict[str, Any] = {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED: dict[str, Any] = _COMMON | {"intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 0.01}
_OPT: dict[str, Any] = _COMMON | {"ffn_dim": 96, "max_position_embeddings": 128}
_NEOX: dict[str, Any] = _COMMON | {"intermediate_size": 96, "max_position_embeddings": 128, "layer_norm_eps": 0.01}
_GPT2: dict[str, Any] = {"vocab_size": 120, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
_GPT2 |= {"layer_norm_epsilon": 0.01}
_LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that with 16 values per head some pairs are stretched, some kept and some on the ramp.
    "original_max_position_embeddings": 32,
}

_WINDOWED: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 28,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
_LOW_IDS: dict[str, Any] = _GATED | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GEMMA: dict[str, Any] = _GATED | {"num_key_value_heads": 2, "head_dim": 24, "query_pre_attn_scalar": 20}

_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

_LAYER_NORM: dict[str, Any] = _COMMON | {"intermediate_size": 96, "max_position_embeddings": 128}
_LAYER_NORM |= {"num_key_value_heads": 2}
_MANY_EXPERTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 25,
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.5 + 0.7 * i for i in range(6)],
}

TINY_MODELS: dict[str, TinyModel] = {
    "llama-long-heads": TinyModel("Llama", _GATED | {"num_key_value_heads": 2, "head_dim": 128}),
    "llama": TinyModel("Llama", _GATED),
    "llama-gqa-tied": TinyModel("Llama", _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases-head-dim": TinyModel(
        "Llama", _GATED | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 24}
    ),
    "llama3-scaling": TinyModel("Llama", _GATED | {"num_key_value_heads": 2, "rope_parameters": _LLAMA3_SCALING}),
    "llama-linear-scaling": TinyModel(
        "Llama", _GATED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
    ),
    "llama3-top-level-original": TinyModel(
        "Llama",
        _GATED
        | {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 32,
        },
    ),
    "llama-yarn": TinyModel("Llama", _GATED | {"rope_scaling": _YARN}),
    "qwen3-yarn": TinyModel(
        "Qwen3",
        _GATED
        | {"num_key_value_heads": 2, "head_dim": 32}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": _YARN | {"rope_theta": 1e6}},
    ),
    "qwen2-yarn-mscale": TinyModel(
        "Qwen2",
        _GATED
        | {"num_key_value_heads": 2}
        | {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 4.0, "truncate": False}},
    ),
    "llama-dynamic": TinyModel(
        "Llama", _GATED | {"max_position_embeddings": 48, "rope_scaling": {"type": "dynamic", "factor": 3.0}}
    ),
    "mistral": TinyModel("Mistral", _GATED | {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": TinyModel("Qwen2", _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": TinyModel("Qwen3", _GATED | {"num_key_value_heads": 2, "head_dim": 32}),
    "opt": TinyModel("OPT", _OPT),
    "opt-350m": TinyModel("OPT", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-gelu-no-bias": TinyModel("OPT", _OPT | {"enable_bias": False, "activation_function": "gelu"}),
    "pythia": TinyModel("GPTNeoX", _NEOX),
    "pythia-sequential": TinyModel(
        "GPTNeoX", _NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0}
    ),
    "gpt2": TinyModel("GPT2", _GPT2),
    "mistral-window": TinyModel("Mistral", _GATED | {"num_key_value_heads": 2, "sliding_window": 9}),
    "qwen2-windows": TinyModel("Qwen2", _GATED | {"num_key_value_heads": 2} | _WINDOWED),
    "qwen3-all-windows": TinyModel(
        "Qwen3",
        _GATED
        | {"num_key_value_heads": 2, "head_dim": 32}
        | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    ),
    "gemma2": TinyModel(
        "Gemma2", _GEMMA | {"sliding_window": 13, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    ),
    "phi3": TinyModel("Phi3", _LOW_IDS | {"sliding_window": 30}),
    "phi3-longrope": TinyModel(
        "Phi3",
        _LOW_IDS
        | {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": _LONGROPE,
        },
    ),
    "olmo2": TinyModel("Olmo2", _GATED | {"num_key_value_heads": 2}),
    "granite": TinyModel(
        "Granite",
        _GATED
        | {
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.3,
        },
    ),
    "smollm3": TinyModel("SmolLM3", _LOW_IDS | {"num_key_value_heads": 2, "no_rope_layer_interval": 2}),
    "smollm3-every-fourth": TinyModel("SmolLM3", _LOW_IDS | {"num_key_value_heads": 2, "num_hidden_layers": 4}),
    "smollm3-windows": TinyModel(
        "SmolLM3",
        _LOW_IDS
        | {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 0]}
        | {"use_sliding_window": True, "sliding_window": 14},
    ),
    "stablelm": TinyModel("StableLm", _LAYER_NORM | {"layer_norm_eps": 0.01, "use_qkv_bias": True}),
    "starcoder2": TinyModel("Starcoder2", _LAYER_NORM | {"norm_epsilon": 0.01, "sliding_window": 20}),
    "mixtral": TinyModel("Mixtral", _GATED | {"num_key_value_heads": 2, "num_local_experts": 5}),
    "qwen3-moe": TinyModel("Qwen3Moe", _GATED | _MANY_EXPERTS | {"norm_topk_prob": True}),
    "qwen3-moe-shares": TinyModel("Qwen3Moe", _GATED | _MANY_EXPERTS | {"use_sliding_window": True}),
    "gpt-oss": TinyModel(
        "GptOss",
        _GATED
        | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 21, "num_hidden_layers": 4}
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "max_position_embeddings": 512}
        | {"rope_scaling": _YARN | {"rope_theta": 5000.0, "truncate": False}},
    ),
    "ministral": TinyModel(
        "Ministral",
        _GATED
        | {"num_key_value_heads": 2, "sliding_window": 10, "head_dim": 16}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3": TinyModel("Gemma3Text", _GEMMA | {"sliding_window": 11, "sliding_window_pattern": 3}),
    "gemma3-scaled": TinyModel(
        "Gemma3Text",
        _GEMMA
        | {
            "sliding_window": 40,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "final_logit_softcapping": 4.0,
        },
    ),
}


def config_of(name: str) -> transformers.PreTrainedConfig:
    """The transformers config of a tiny model."""
    tiny = TINY_MODELS[name]
    return getattr(transformers, f"{tiny.architecture}Config")(**tiny.fields)


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A tiny model in float32 with every parameter drawn anew, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and parameter_name.endswith("weight")
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.15 * noise)
    return model


def save(model: transformers.PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Write a checkpoint (`save_pretrained` with its options) and return its directory."""
    model.save_pretrained(directory, **options)
    return directory


SPECIAL = "<|im_end|>"


def checkpoint(directory, special_id=None):
    """A tiny model whose tokenizer knows the words w0, w1, ...; one of them may be a special token."""
    # A GPU machine may be without the library.
    from tokenizers import Tokenizer, models, pre_tokenizers

    save(build("llama-gqa-tied"), directory)
    words = {f"w{index}": index for index in range(config_of("llama-gqa-tied").vocab_size)}
    if special_id is not None:
        del words[f"w{special_id}"]
        words[SPECIAL] = special_id
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special_id is not None:
        tokenizer.add_special_tokens([SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"unk_token": "w0"}))
    return directory
