"""LLaMA 1 to 3 and the many models published under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a LLaMA config."""
    reader = ConfigReader(config, "llama")
    attention_bias = reader.flag("attention_bias", False)
    variant = LlamaVariant(
        "llama",
        max_positions=2048,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )
    return read_spec(reader, variant)


FAMILY = Family("llama", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
