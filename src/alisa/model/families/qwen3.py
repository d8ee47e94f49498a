"""Qwen 3 (dense): LLaMA with an RMS norm on every head of q and k, and a head dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, qwen_windows, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Qwen3 config."""
    reader = ConfigReader(config, "qwen3")
    bias = reader.flag("attention_bias", False)
    windows = qwen_windows(reader)
    variant = LlamaVariant(
        "qwen3", max_positions=32768, qkv_bias=bias, out_bias=bias, qk_norm=True, head_dim=128, num_kv_heads=32
    )
    return replace(read_spec(reader, variant), windows=windows)


FAMILY = Family("qwen3", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
