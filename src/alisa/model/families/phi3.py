"""Phi-3 and Phi-4-mini (2404.14219): LLaMA with fused products, a part of each head rotated, and longrope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from alisa.model.families.family import Family, WeightPiece
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

_SIZES = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Phi-3 config; "su" and "yarn" are what its authors called longrope before it had a name."""
    renamed = {name: _longrope(config.get(name)) for name in ("rope_scaling", "rope_parameters") if name in config}
    reader = ConfigReader({"original_max_position_embeddings": 4096} | dict(config) | renamed, "phi3")
    num_layers = reader.integer("num_hidden_layers", _SIZES["num_hidden_layers"])
    for name in (
        "full_attn_mod",
        "interpolate_factor",
    ):
        reader.fixed(name, 1)
    windows = reader.windows(num_layers, reader.window(None))
    variant = LlamaVariant("phi3", max_positions=4096, norm_eps=1e-5, sizes=_SIZES)
    return replace(read_spec(reader, variant), windows=windows)


def _longrope(fields: object) -> object:
    if not isinstance(fields, Mapping):
        return fields
    return {name: "longrope" if value in ("su", "yarn") else value for name, value in fields.items()}


def _q(fused: Tensor, spec: ModelSpec) -> Tensor:
    return fused[: spec.q_size]


def _kv(fused: Tensor, spec: ModelSpec) -> Tensor:
    return fused[spec.q_size :]


_FUSED = "layers.{layer}.self_attn.qkv_proj.weight"

_PARTS = LAYER_PARTS | {
    "q.weight": (WeightPiece(_FUSED, _q),),
    "kv.weight": (WeightPiece(_FUSED, _kv),),
    "up.weight": (WeightPiece("layers.{layer}.mlp.gate_up_proj.weight"),),
}

FAMILY = Family("phi3", to_spec, MODEL_PARTS, _PARTS, PREFIXES, aliases={})
