"""Granite 3 (dense): LLaMA with a number of its own at embeddings, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Granite config."""
    reader = ConfigReader(config, "granite")
    bias = reader.flag("attention_bias", False)
    embed_scale, residual_scale = reader.number("embedding_multiplier", 1.0), reader.number("residual_multiplier", 1.0)
    query_scale, logits_scaling = reader.number("attention_multiplier", 1.0), reader.number("logits_scaling", 1.0)
    mlp_bias = reader.flag("mlp_bias", False)
    variant = LlamaVariant("granite", max_positions=2048, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)
    return replace(
        read_spec(reader, variant),
        embed_scale=embed_scale,
        residual_scale=residual_scale,
        query_scale=query_scale,
        logit_scale=1.0 / logits_scaling,
    )


FAMILY = Family("granite", to_spec, MODEL_PARTS, LAYER_PARTS, PREFIXES, aliases={})
