"""What Gemma 2 and 3 share in GGUF: four norms in each layer, stored as the factors 1 + w that they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec

_NORM_STEMS = {
    "post_attention_norm": "layers.{layer}.post_attention_layernorm",
    "post_ffw_norm": "layers.{layer}.post_feedforward_layernorm",
    "ffn_norm": "layers.{layer}.pre_feedforward_layernorm",
}


def query_scale(fields: ArchitectureFields, config: dict[str, Any], largest: int) -> int | None:
    """What queries are divided by the root of, which no file says: the length of a head, but in the largest model.

    Args:
        fields: the metadata.
        config: read so far.
        largest: layers of the largest model, which takes the hidden size over the heads.
    """
    if fields.get("block_count") == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim")


def _distance_from_one(weight: Tensor, spec: ModelSpec) -> Tensor:
    """The factor of a norm, in float32, as the family stores it."""
    return weight - 1.0


GEMMA_LAYER_STEMS = LAYER_STEMS | QK_NORM_STEMS | _NORM_STEMS
RESTORE_NORMS = dict.fromkeys(
    ("output_norm", "attn_norm", "attn_q_norm", "attn_k_norm", *_NORM_STEMS), _distance_from_one
)
