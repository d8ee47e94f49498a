"""Gemma 2: scores and logits below a cap, and a sliding window in every other layer, from the first on."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config, without_none
from alisa.model.gguf.architectures.gemma_like import GEMMA_LAYER_STEMS, RESTORE_NORMS, query_scale
from alisa.model.gguf.architectures.llama_like import MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields

_LAYERS_OF_27B = 46


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Gemma 2's config."""
    config = rms_norm_config(fields)
    return config | without_none(
        model_type="gemma2",
        query_pre_attn_scalar=query_scale(fields, config, _LAYERS_OF_27B),
        sliding_window=fields.get("attention.sliding_window"),
        attn_logit_softcapping=fields.get("attn_logit_softcapping"),
        final_logit_softcapping=fields.get("final_logit_softcapping"),
    )


ARCHITECTURE = Architecture("gemma2", read_config, MODEL_STEMS, GEMMA_LAYER_STEMS, RESTORE_NORMS)
