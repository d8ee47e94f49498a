"""Granite 3 (dense): LLaMA with a number of its own at embeddings, scores, residuals and logits."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, without_none
from alisa.model.gguf.architectures.llama_like import HALF_SPLIT, LAYER_STEMS, MODEL_STEMS, biases, interleaved_config
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Granite's config."""
    return (
        interleaved_config(fields)
        | biases(fields)
        | without_none(
            model_type="granite",
            embedding_multiplier=fields.get("embedding_scale"),
            attention_multiplier=fields.get("attention.scale"),
            residual_multiplier=fields.get("residual_scale"),
            logits_scaling=fields.get("logit_scale"),
        )
    )


ARCHITECTURE = Architecture("granite", read_config, MODEL_STEMS, LAYER_STEMS, HALF_SPLIT)
