"""Qwen 3 (dense): tensors as they are on the hub, with norms of q and k."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Qwen 3's config."""
    bias = fields.has_tensor("blk.0.attn_output.bias")
    return rms_norm_config(fields) | {"model_type": "qwen3", "attention_bias": bias}


ARCHITECTURE = Architecture("qwen3", read_config, MODEL_STEMS, LAYER_STEMS | QK_NORM_STEMS)
