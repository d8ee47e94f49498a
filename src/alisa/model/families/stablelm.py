"""StableLM (2402.17834): LLaMA with layer norms and a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family, same
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

_SIZES = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a StableLM config."""
    reader = ConfigReader({"partial_rotary_factor": 0.25} | dict(config), "stablelm")
    reader.fixed("qk_layernorm", False)
    reader.fixed("use_parallel_residual", False)
    variant = LlamaVariant(
        "stablelm",
        max_positions=4096,
        num_kv_heads=32,
        sizes=_SIZES,
        qkv_bias=reader.flag("use_qkv_bias", False),
        norm_eps=1e-5,
        norm_eps_name="layer_norm_eps",
    )
    return replace(read_spec(reader, variant), norm="layernorm")


FAMILY = Family("stablelm", to_spec, MODEL_PARTS | same(final_norm="norm"), LAYER_PARTS, PREFIXES, aliases={})
