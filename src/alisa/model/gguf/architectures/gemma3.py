"""Gemma 3 (text): which layers have a sliding window follows from their number, unless the file says otherwise."""

from __future__ import annotations

from typing import Any

from alisa.model.families.reading import FULL, SLIDING
from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config, without_none
from alisa.model.gguf.architectures.gemma_like import GEMMA_LAYER_STEMS, RESTORE_NORMS, query_scale
from alisa.model.gguf.architectures.llama_like import MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields

_FULL_EVERY = 6
_LAYERS_OF_27B = 62


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Gemma 3's config of a text model."""
    config = rms_norm_config(fields)
    return config | without_none(
        model_type="gemma3_text",
        query_pre_attn_scalar=query_scale(fields, config, _LAYERS_OF_27B),
        sliding_window=fields.get("attention.sliding_window"),
        layer_types=_layer_types(fields),
        rope_local_base_freq=fields.get("rope.freq_base_swa"),
        final_logit_softcapping=fields.get("final_logit_softcapping"),
    )


def _layer_types(fields: ArchitectureFields) -> list[str]:
    """Of each layer: by a flag for each, or by the distance between the layers that see all tokens."""
    num_layers = fields.get("block_count") or 0
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, bool):
        flags = [pattern] * num_layers
    elif isinstance(pattern, list):
        flags = pattern
    else:
        every = pattern or _FULL_EVERY
        flags = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return [SLIDING if flag else FULL for flag in flags]


ARCHITECTURE = Architecture("gemma3", read_config, MODEL_STEMS, GEMMA_LAYER_STEMS, RESTORE_NORMS)
