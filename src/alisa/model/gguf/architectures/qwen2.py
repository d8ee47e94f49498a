"""Qwen 2 and 2.5: tensors as they are on the hub."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Qwen 2's config."""
    return rms_norm_config(fields) | {"model_type": "qwen2"}


ARCHITECTURE = Architecture("qwen2", read_config, MODEL_STEMS, LAYER_STEMS)
