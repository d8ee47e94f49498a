"""Small GGUF files, written with the `gguf` package: what the converters of llama.cpp make of the tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gptneox": gguf.MODEL_ARCH.GPTNEOX,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}
ARCHITECTURES = {
    "gpt_neox": "gptneox",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen3_moe": "qwen3moe",
}
"""`model_type` of a config -> architecture, where they differ."""

_SCALES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
"""Numbers of some architectures -> the fields of configs that have them."""

VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|endoftext|>", *(f"<{i}>" for i in range(116))],
    "tokenizer.ggml.token_type": [1, 1, 1, *[3] * 117],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """A file with these values and tensors: numbers `[out, in]`, and the name of the format they go into."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for name, value in metadata.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        stored = values if kind == "F32" else values.astype(np.float16) if kind == "F16" else quantize(values, number)
        writer.add_tensor(name, stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """What the converter of llama.cpp says of a model."""
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * hidden,
        "attention.head_count": heads,
    }
    if kind == "gpt2":
        values["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    elif kind == "gptneox":
        values["attention.layer_norm_epsilon"] = config.layer_norm_eps
        values["use_parallel_residual"] = config.use_parallel_residual
        values["rope.dimension_count"] = int(head_dim * config.rope_parameters["partial_rotary_factor"])
    else:
        rope = config.rope_parameters
        if kind == "gemma3":
            rope, local = rope["full_attention"], rope["sliding_attention"]
            values["rope.freq_base_swa"] = local["rope_theta"]
            values["attention.sliding_window_pattern"] = [name != "full_attention" for name in config.layer_types]
        for theirs, ours in _SCALES.items():
            if getattr(config, ours, None):
                values[theirs] = getattr(config, ours)
        values["attention.head_count_kv"] = config.num_key_value_heads
        if kind in ("stablelm", "starcoder2"):
            epsilon = "layer_norm_eps" if kind == "stablelm" else "norm_epsilon"
            values["attention.layer_norm_epsilon"] = getattr(config, epsilon)
        else:
            values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        values |= _special(kind, config, rope, head_dim)
        values["rope.freq_base"] = rope["rope_theta"]
        if getattr(config, "sliding_window", None) and kind != "qwen3moe":
            values["attention.sliding_window"] = config.sliding_window
        if head_dim != hidden // heads or kind == "gemma2":
            values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        if _CONVERTERS.get(kind) is _interleaved:
            values |= {"rope.dimension_count": head_dim, "vocab_size": config.vocab_size}
        if rope["rope_type"] in ("linear", "yarn"):
            values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        if rope["rope_type"] == "yarn":
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {"general.architecture": kind} | {f"{kind}.{name}": value for name, value in values.items()} | VOCABULARY


def _special(
    kind: str, config: transformers.PreTrainedConfig, rope: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """What only some converters write."""
    values: dict[str, Any] = {}
    if kind in ("phi3", "stablelm"):
        values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if kind == "stablelm":
        values["use_parallel_residual"] = True  # theirs says so of all that leave it open
    if kind == "phi3":
        values["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        values["rope.scaling.attn_factor"] = math.sqrt(
            1 + math.log(scale) / math.log(config.original_max_position_embeddings)
        )
    if config.model_type in ("mixtral", "qwen3_moe"):
        values["expert_count"] = config.num_local_experts if kind == "llama" else config.num_experts
        values["expert_used_count"] = config.num_experts_per_tok
    if kind == "qwen3moe":
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    return values


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a model as llama.cpp wants them."""
    tensors = named(model.state_dict(), model.config)
    scaling = getattr(model.config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_divisors(model)
    if scaling.get("rope_type") == "longrope":
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = np.array(scaling[f"{length}_factor"], dtype=np.float32)
    return tensors


def named(state: Mapping[str, torch.Tensor], config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint in the order of rows that llama.cpp wants, by their names there."""
    kind = ARCHITECTURES.get(config.model_type, config.model_type)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[kind], config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in _experts_apart(state):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _CONVERTERS.get(kind, lambda name, values, config: values)(name, tensor, config)
        tensors[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = values.contiguous().numpy()
    return tensors


def write_model(path: Path, model: transformers.PreTrainedModel, kind: str = "F32") -> Path:
    """The model as a file, its matrices in a number format; the model gets the numbers that the file stands for."""
    number = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for name, values in tensors_of(model).items():
        tensors[name] = (values, kind if values.ndim >= 2 else "F32")
    if kind != "F32":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    # Rows are rounded alone, so that their order in the file does not matter.
                    stored = quantize(parameter.numpy(), number)
                    parameter.copy_(torch.from_numpy(dequantize(stored, number)))
    return write(path, metadata_of(model.config), tensors)


def _experts_apart(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint; gate and up of all experts, which transformers keeps as one, as two."""
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield f"{stem}.{part}.weight", rows
        else:
            yield (f"{name}.weight" if last == "down_proj" else name), tensor


def _interleaved(name: str, values: torch.Tensor, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """LLaMA's rows of q and k, from the first and second half of a head to pairs."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    first_and_second = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return first_and_second.swapaxes(1, 2).reshape(values.shape)


def _apart(name: str, values: torch.Tensor, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """GPT-NeoX's rows: q of all heads, then k, then v."""
    if "query_key_value" not in name:
        return values
    by_head = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return torch.cat([by_head[:, which] for which in range(3)]).reshape(values.shape)


def _turned(name: str, values: torch.Tensor, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """GPT-2's matrices as `[out, in]`."""
    return values.t() if ".c_" in name and values.dim() == 2 else values


def _around_one(name: str, values: torch.Tensor, config: transformers.PreTrainedConfig) -> torch.Tensor:
    """Gemma's norms as the factors that they are."""
    return values + 1 if name.endswith("norm.weight") else values


_CONVERTERS: dict[str, Callable[[str, torch.Tensor, transformers.PreTrainedConfig], torch.Tensor]]
_CONVERTERS = {"gptneox": _apart, "gpt2": _turned, "gemma2": _around_one, "gemma3": _around_one}
_CONVERTERS |= dict.fromkeys(("llama", "granite", "smollm3"), _interleaved)


def _llama3_divisors(model: transformers.PreTrainedModel) -> np.ndarray:
    """What transformers divides the frequencies by."""
    rotary = model.model.rotary_emb
    head_dim, theta = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / rotary.inv_freq).numpy()
