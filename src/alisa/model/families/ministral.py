"""Ministral: Mistral with a sliding window in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Ministral config."""
    reader = ConfigReader(config, "ministral")
    windows = reader.windows(reader.integer("num_hidden_layers"), reader.window(4096))
    spec = read_spec(reader, LlamaVariant("ministral", max_positions=131072, num_kv_heads=8))
    return replace(spec, windows=windows)


FAMILY = Family("ministral", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
