"""LLaMA, Mistral and what was published in their form."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture
from alisa.model.gguf.architectures.llama_like import HALF_SPLIT, LAYER_STEMS, MODEL_STEMS, biases, interleaved_config
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Mistral's config when the file has a sliding window, LLaMA's otherwise."""
    config = interleaved_config(fields)
    window = fields.get("attention.sliding_window")
    if window:
        return config | {"model_type": "mistral", "sliding_window": window}
    return config | biases(fields) | {"model_type": "llama"}


ARCHITECTURE = Architecture("llama", read_config, MODEL_STEMS, LAYER_STEMS, HALF_SPLIT)
