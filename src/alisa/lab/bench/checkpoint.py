"""Write a Hugging Face checkpoint of a given shape with random bfloat16 weights, once, for all engines.

Speed does not depend on what the weights are, as long as no value overflows; a normal distribution of 0.02, as most
models are initialised with, keeps the logits small. The tokenizer that is written with them has one token for each
byte and fillers up to the size of the vocabulary: no engine needs it for token ids, but some refuse a directory without
one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alisa.errors import InputError
from alisa.spec import ModelSpec

INIT_STD = 0.02
BOS, EOS = "<s>", "</s>"


def config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a spec."""
    common = {
        "model_type": spec.family,
        "torch_dtype": "bfloat16",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if spec.family == "opt":
        return common | {
            "architectures": ["OPTForCausalLM"],
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "ffn_dim": spec.ffn_size,
            "word_embed_proj_dim": spec.hidden_size,
            "tie_word_embeddings": True,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "intermediate_size": spec.ffn_size,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta if spec.rope else None,
        "tie_word_embeddings": False,
    }


def opt_sizes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of an OPT checkpoint with tied embeddings."""
    wide, ffn = spec.hidden_size, spec.ffn_size
    sizes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (spec.vocab_size, wide),
        "model.decoder.embed_positions.weight": (spec.position_table_size, wide),
    }
    names = ["model.decoder.final_layer_norm"]
    for layer in range(spec.num_layers):
        prefix = f"model.decoder.layers.{layer}"
        names += [f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes |= _linear(f"{prefix}.self_attn.{name}", wide, wide)
        sizes |= _linear(f"{prefix}.fc1", ffn, wide) | _linear(f"{prefix}.fc2", wide, ffn)
    return sizes | {f"{name}.{part}": (wide,) for name in names for part in ("weight", "bias")}


def llama_sizes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaMA checkpoint."""
    wide, ffn = spec.hidden_size, spec.ffn_size
    kv = spec.kv_size
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (spec.vocab_size, wide),
    }
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.input_layernorm.weight": (wide,),
            f"{prefix}.post_attention_layernorm.weight": (wide,),
            f"{prefix}.self_attn.q_proj.weight": (wide, wide),
            f"{prefix}.self_attn.k_proj.weight": (kv, wide),
            f"{prefix}.self_attn.v_proj.weight": (kv, wide),
            f"{prefix}.self_attn.o_proj.weight": (wide, wide),
            f"{prefix}.mlp.gate_proj.weight": (ffn, wide),
            f"{prefix}.mlp.up_proj.weight": (ffn, wide),
            f"{prefix}.mlp.down_proj.weight": (wide, ffn),
        }
    return sizes


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer.json without merges, as large as the model's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (chr(256 + index) for index in range(256 - len(printable)))
    letters = [chr(byte) if byte in printable else next(others) for byte in range(256)]
    tokens = [BOS, EOS, *letters]
    tokens += [f"<{index}>" for index in range(len(tokens), vocab_size)]
    special = [
        {
            "id": index,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, token in enumerate((BOS, EOS))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = {"type": "BPE", "unk_token": None, "fuse_unk": False, "byte_fallback": False, "dropout": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model | {"vocab": vocabulary, "merges": [], "ignore_merges": False},
    }


def is_written(directory: Path) -> bool:
    """Whether a complete checkpoint lies there."""
    return (directory / "model.safetensors").exists()


def write_checkpoint(spec: ModelSpec, directory: Path, seed: int = 0) -> None:
    """Write the checkpoint; the weights come last, so that their presence says that it is complete.

    Raises:
        InputError: it is of a family that this file does not know.
    """
    if spec.family not in ("opt", "llama"):
        raise InputError(
            f"Checkpoints with random weights are made for opt and llama shapes, not for {spec.family}; give the "
            "directory of a model instead."
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    for name, content in (
        ("config.json", config(spec)),
        ("tokenizer.json", tokenizer(spec.vocab_size)),
        ("tokenizer_config.json", settings),
    ):
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    sizes = opt_sizes(spec) if spec.family == "opt" else llama_sizes(spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _fill(name, size, generator) for name, size in sizes.items()}
    partial = directory / "partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")


def _linear(name: str, out_size: int, in_size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_size, in_size), f"{name}.bias": (out_size,)}


def _fill(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for the scale of a norm, a normal distribution for everything else."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, INIT_STD, generator=generator)
