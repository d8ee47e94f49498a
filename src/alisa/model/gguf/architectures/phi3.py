"""Phi-3 and Phi-4-mini: q, k and v in one tensor, gate and up in another; longrope's factors are tensors."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, common_config, rotary_part, without_none
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields

_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Phi-3's config."""
    return common_config(fields) | without_none(
        model_type="phi3",
        rms_norm_eps=fields.get("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.get("rope.freq_base"),
        partial_rotary_factor=rotary_part(fields),
        sliding_window=fields.get("attention.sliding_window"),
        original_max_position_embeddings=fields.get("rope.scaling.original_context_length"),
        rope_scaling=_longrope(fields),
    )


def _longrope(fields: ArchitectureFields) -> dict[str, Any] | None:
    factors = without_none(**{name: fields.numbers(tensor) for name, tensor in _FACTORS.items()})
    kind = fields.get("rope.scaling.type")
    if kind not in (None, "none", "longrope") or (kind == "longrope" and not factors):
        fields.refuse("rope.scaling.type", "longrope with its factors is supported")
    attention_factor = fields.get("rope.scaling.attn_factor")
    return {"type": "longrope", **factors, **without_none(attention_factor=attention_factor)} if factors else None


_STEMS = LAYER_STEMS | {
    "attn_qkv": "layers.{layer}.self_attn.qkv_proj",
    "ffn_up": "layers.{layer}.mlp.gate_up_proj",
}

ARCHITECTURE = Architecture("phi3", read_config, MODEL_STEMS, _STEMS, metadata_tensors=tuple(_FACTORS.values()))
