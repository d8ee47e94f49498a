"""Mistral: LLaMA with grouped heads and, in the first version, a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Mistral config."""
    reader = ConfigReader(config, "mistral")
    num_layers = reader.integer("num_hidden_layers")
    # Absent means 4096 in the family's config class, null means no window (v0.2 and later).
    window = reader.window(4096)
    spec = read_spec(reader, LlamaVariant("mistral", max_positions=131072, num_kv_heads=8))
    return replace(spec, windows=() if window is None else (window,) * num_layers)


FAMILY = Family("mistral", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
