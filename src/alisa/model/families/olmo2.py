"""OLMo 2 (2501.00656): LLaMA with norms after attention and MLP, and one over all heads of q and of k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family, same
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read an OLMo 2 config."""
    reader = ConfigReader(config, "olmo2")
    bias = reader.flag("attention_bias", False)
    variant = LlamaVariant(
        "olmo2", max_positions=2048, norm_eps=1e-5, qkv_bias=bias, out_bias=bias, qk_norm=True, norm_place="after"
    )
    return replace(read_spec(reader, variant), qk_norm_joint=True)


_PARTS = LAYER_PARTS | same(
    attn_post_norm="layers.{layer}.post_attention_layernorm", mlp_post_norm="layers.{layer}.post_feedforward_layernorm"
)

FAMILY = Family("olmo2", to_spec, MODEL_PARTS, _PARTS, PREFIXES, aliases={})
