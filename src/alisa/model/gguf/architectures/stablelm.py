"""StableLM: layer norms, and a part of each head rotated."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import (
    Architecture,
    common_config,
    rope_scaling,
    rotary_part,
    without_none,
)
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """StableLM's config; a layer without a norm before its MLP is a parallel one, whatever the metadata say."""
    fields.get("use_parallel_residual")
    return common_config(fields) | without_none(
        model_type="stablelm",
        layer_norm_eps=fields.get("attention.layer_norm_epsilon"),
        rope_theta=fields.get("rope.freq_base"),
        rope_scaling=rope_scaling(fields),
        partial_rotary_factor=rotary_part(fields) or 1.0,
        use_qkv_bias=fields.has_tensor("blk.0.attn_q.bias"),
        qk_layernorm=fields.has_tensor("blk.0.attn_q_norm.weight"),
        use_parallel_residual=not fields.has_tensor("blk.0.ffn_norm.weight"),
    )


ARCHITECTURE = Architecture("stablelm", read_config, MODEL_STEMS, LAYER_STEMS | QK_NORM_STEMS)
