"""SmolLM3: LLaMA that does not rotate q and k in every fourth layer, which no file says."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture
from alisa.model.gguf.architectures.llama_like import HALF_SPLIT, LAYER_STEMS, MODEL_STEMS, biases, interleaved_config
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """SmolLM3's config."""
    return interleaved_config(fields) | biases(fields) | {"model_type": "smollm3", "no_rope_layer_interval": 4}


ARCHITECTURE = Architecture("smollm3", read_config, MODEL_STEMS, LAYER_STEMS, HALF_SPLIT)
