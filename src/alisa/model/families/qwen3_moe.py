"""Qwen 3 with experts (30B-A3B and 235B-A22B): Qwen 3 whose every layer has many small MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from alisa.model.families.family import Family, WeightPiece, joined, same
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Qwen3-MoE config."""
    reader = ConfigReader(config, "qwen3_moe")
    num_layers = reader.integer("num_hidden_layers")
    window = reader.window(4096) if reader.flag("use_sliding_window", False) else None
    reader.ignore("sliding_window", "max_window_layers", "intermediate_size")
    bias = reader.flag("attention_bias", False)
    num_experts, per_token = reader.experts(128, 8)
    expert_size = reader.integer("moe_intermediate_size", 768)
    renormalises = reader.flag("norm_topk_prob", False)
    # Layers without experts among those that have them; no published model has any.
    reader.fixed("decoder_sparse_step", 1)
    reader.fixed("mlp_only_layers", [])
    variant = LlamaVariant(
        "qwen3_moe",
        max_positions=32768,
        num_kv_heads=4,
        sizes={"intermediate_size": expert_size},
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    return replace(
        read_spec(reader, variant),
        ffn_size=expert_size,
        windows=() if window is None else (window,) * num_layers,
        num_experts=num_experts,
        experts_per_token=per_token,
        renormalises_experts=renormalises,
    )


_MLP = "layers.{layer}.mlp"
_EXPERT = f"{_MLP}.experts.{{expert}}"

_PARTS = {
    **LAYER_PARTS,
    "router.weight": (WeightPiece(f"{_MLP}.gate.weight"),),
    **joined("experts.{expert}.up", f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"),
    **same(**{"experts.{expert}.down": f"{_EXPERT}.down_proj"}),
}

FAMILY = Family("qwen3_moe", to_spec, MODEL_PARTS, _PARTS, PREFIXES, aliases={})
