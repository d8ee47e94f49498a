"""Mixtral (2401.04088): Mistral with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family, WeightPiece, joined, same
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Mixtral config."""
    reader = ConfigReader(config, "mixtral")
    num_layers = reader.integer("num_hidden_layers")
    window = reader.window(None)
    num_experts, per_token = reader.experts(8, 2)
    spec = read_spec(reader, LlamaVariant("mixtral", max_positions=131072, num_kv_heads=8, norm_eps=1e-5))
    return replace(
        spec,
        windows=() if window is None else (window,) * num_layers,
        num_experts=num_experts,
        experts_per_token=per_token,
    )


_MLP = "layers.{layer}.block_sparse_moe"
_EXPERT = f"{_MLP}.experts.{{expert}}"

_PARTS = {
    **LAYER_PARTS,
    "router.weight": (WeightPiece(f"{_MLP}.gate.weight"),),
    **joined("experts.{expert}.up", f"{_EXPERT}.w1", f"{_EXPERT}.w3"),
    **same(**{"experts.{expert}.down": f"{_EXPERT}.w2"}),
}

FAMILY = Family("mixtral", to_spec, MODEL_PARTS, _PARTS, PREFIXES, aliases={})
