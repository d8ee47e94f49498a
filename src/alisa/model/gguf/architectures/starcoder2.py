"""StarCoder 2: layer norms, biases and a plain MLP. The format does not say which sizes have a sliding window."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, common_config, rope_scaling, without_none
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """StarCoder 2's config."""
    return common_config(fields) | without_none(
        model_type="starcoder2",
        norm_epsilon=fields.get("attention.layer_norm_epsilon"),
        rope_theta=fields.get("rope.freq_base"),
        rope_scaling=rope_scaling(fields),
        sliding_window=fields.get("attention.sliding_window"),
        use_bias=fields.has_tensor("blk.0.attn_output.bias"),
    )


_STEMS = LAYER_STEMS | {"ffn_up": "layers.{layer}.mlp.c_fc", "ffn_down": "layers.{layer}.mlp.c_proj"}

ARCHITECTURE = Architecture("starcoder2", read_config, MODEL_STEMS, _STEMS)
