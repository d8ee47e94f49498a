"""Gemma 3 (text): norms are stored as 1 + w, and what the hub's config says of the layers follows from their number."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.families.reading import FULL, SLIDING
from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config, without_none
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec

_FULL_EVERY = 6
"""Every sixth layer sees all tokens, unless the file says otherwise."""
_LAYERS_OF_27B = 62
"""The largest model alone scales its queries by the hidden size over the heads, not by the length of a head."""


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Gemma 3's config of a text model."""
    config = rms_norm_config(fields)
    num_layers = fields.get("block_count")
    if num_layers == _LAYERS_OF_27B:
        scaled_by = config["hidden_size"] // config["num_attention_heads"]
    else:
        scaled_by = config.get("head_dim")
    return config | without_none(
        model_type="gemma3_text",
        query_pre_attn_scalar=scaled_by,
        sliding_window=fields.get("attention.sliding_window"),
        layer_types=_layer_types(fields, num_layers or 0),
        rope_local_base_freq=fields.get("rope.freq_base_swa"),
        final_logit_softcapping=fields.get("final_logit_softcapping"),
    )


def _layer_types(fields: ArchitectureFields, num_layers: int) -> list[str]:
    """Of each layer, by its own flag, or by the distance between layers that see all tokens."""
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, bool):
        flags = [pattern] * num_layers
    elif isinstance(pattern, list):
        flags = pattern
    else:
        every = pattern or _FULL_EVERY
        flags = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return [SLIDING if flag else FULL for flag in flags]


def _distance_from_one(weight: Tensor, spec: ModelSpec) -> Tensor:
    """The factor of a norm, in float32, as the family stores it."""
    return weight - 1.0


_POST_NORMS = {
    "post_attention_norm": "layers.{layer}.post_attention_layernorm",
    "post_ffw_norm": "layers.{layer}.post_feedforward_layernorm",
    "ffn_norm": "layers.{layer}.pre_feedforward_layernorm",
}
_NORMS = ("output_norm", "attn_norm", "attn_q_norm", "attn_k_norm", *_POST_NORMS)

ARCHITECTURE = Architecture(
    "gemma3",
    read_config,
    MODEL_STEMS,
    LAYER_STEMS | QK_NORM_STEMS | _POST_NORMS,
    restore=dict.fromkeys(_NORMS, _distance_from_one),
)
