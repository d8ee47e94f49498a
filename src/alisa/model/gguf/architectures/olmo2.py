"""OLMo 2: norms after attention and MLP, and one over all heads of q and of k."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """OLMo 2's config."""
    return rms_norm_config(fields) | {
        "model_type": "olmo2",
        "attention_bias": fields.has_tensor("blk.0.attn_output.bias"),
    }


_NORM_STEMS = {
    "post_attention_norm": "layers.{layer}.post_attention_layernorm",
    "post_ffw_norm": "layers.{layer}.post_feedforward_layernorm",
}

ARCHITECTURE = Architecture("olmo2", read_config, MODEL_STEMS, LAYER_STEMS | QK_NORM_STEMS | _NORM_STEMS)
