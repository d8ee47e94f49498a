"""LLaMA, Mistral and what was published in their form: rows of q and k are in the order of interleaved rotation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.gguf.architectures.architecture import Architecture, Restore, rms_norm_config
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Mistral's config when the file has a sliding window, LLaMA's otherwise."""
    config = rms_norm_config(fields)
    window = fields.get("attention.sliding_window")
    if "partial_rotary_factor" in config:
        fields.refuse("rope.dimension_count", "the length of a head is supported")
    if window:
        return config | {"model_type": "mistral", "sliding_window": window}
    biases = {
        "attention_bias": fields.has_tensor("blk.0.attn_output.bias"),
        "mlp_bias": fields.has_tensor("blk.0.ffn_down.bias"),
    }
    return config | biases | {"model_type": "llama"}


def _half_split(of_keys: bool) -> Restore:
    """Rows of each head from the interleaved order (0, D/2, 1, D/2 + 1, ...) to the half-split one."""

    def restore(rows: Tensor, spec: ModelSpec) -> Tensor:
        num_heads = spec.num_kv_heads if of_keys else spec.num_heads
        pairs = rows.view(num_heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    return restore


ARCHITECTURE = Architecture(
    "llama",
    read_config,
    MODEL_STEMS,
    LAYER_STEMS,
    restore={"attn_q": _half_split(of_keys=False), "attn_k": _half_split(of_keys=True)},
)
