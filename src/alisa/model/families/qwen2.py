"""Qwen 2 and 2.5: LLaMA with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, qwen_windows, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Qwen2 config."""
    reader = ConfigReader(config, "qwen2")
    windows = qwen_windows(reader)
    variant = LlamaVariant("qwen2", max_positions=32768, qkv_bias=True, num_kv_heads=32)
    return replace(read_spec(reader, variant), windows=windows)


FAMILY = Family("qwen2", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
