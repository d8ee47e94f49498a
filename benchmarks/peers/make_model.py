"""Write a Hugging Face checkpoint of a given shape with random bfloat16 weights, once, for all engines.

    python benchmarks/peers/make_model.py --shape opt-1.3b

Speed does not depend on what the weights are, as long as no value overflows; a normal distribution of 0.02, as most
models are initialised with, keeps the logits small. The tokenizer beside them has one token per byte and fillers up to
the size of the vocabulary: no engine needs it for token ids, but some refuse a directory without one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from workload import SHAPES, Shape

INIT_STD = 0.02
BOS, EOS = "<s>", "</s>"


def config(shape: Shape) -> dict[str, Any]:
    """The config.json of a shape."""
    common = {
        "model_type": shape.family,
        "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if shape.family == "opt":
        return common | {
            "architectures": ["OPTForCausalLM"],
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "ffn_dim": shape.ffn_size,
            "word_embed_proj_dim": shape.hidden_size,
            "tie_word_embeddings": True,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "intermediate_size": shape.ffn_size,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def opt_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of an OPT checkpoint with tied embeddings."""
    wide, ffn = shape.hidden_size, shape.ffn_size
    sizes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (shape.vocab_size, wide),
        "model.decoder.embed_positions.weight": (shape.max_positions + 2, wide),
    }
    names = ["model.decoder.final_layer_norm"]
    for layer in range(shape.num_layers):
        prefix = f"model.decoder.layers.{layer}"
        names += [f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes |= _linear(f"{prefix}.self_attn.{name}", wide, wide)
        sizes |= _linear(f"{prefix}.fc1", ffn, wide) | _linear(f"{prefix}.fc2", wide, ffn)
    return sizes | {f"{name}.{part}": (wide,) for name in names for part in ("weight", "bias")}


def llama_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LLaMA checkpoint."""
    wide, ffn = shape.hidden_size, shape.ffn_size
    kv = wide // shape.num_heads * shape.num_kv_heads
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, wide),
        "model.norm.weight": (wide,),
        "lm_head.weight": (shape.vocab_size, wide),
    }
    for layer in range(shape.num_layers):
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


def write_model(shape: Shape, directory: Path, seed: int) -> None:
    """Write the checkpoint; the weights come last, so that their presence says that it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    for name, content in (
        ("config.json", config(shape)),
        ("tokenizer.json", tokenizer(shape.vocab_size)),
        ("tokenizer_config.json", settings),
    ):
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    sizes = opt_sizes(shape) if shape.family == "opt" else llama_sizes(shape)
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


def main() -> None:
    """Write the model of one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--models", type=Path, default=Path(".peers/models"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    directory = args.models / args.shape
    write_model(SHAPES[args.shape], directory, args.seed)
    print(directory)


if __name__ == "__main__":
    main()
