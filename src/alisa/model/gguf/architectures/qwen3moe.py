"""Qwen 3 with experts: Qwen 3 with one tensor for the experts of a layer."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, rms_norm_config, without_none
from alisa.model.gguf.architectures.llama_like import LAYER_STEMS, MODEL_STEMS, QK_NORM_STEMS
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Qwen 3's config with experts, whose shares add up to 1: the format does not say otherwise."""
    return rms_norm_config(fields) | without_none(
        model_type="qwen3_moe",
        num_experts=fields.get("expert_count"),
        num_experts_per_tok=fields.get("expert_used_count"),
        moe_intermediate_size=fields.get("expert_feed_forward_length"),
        norm_topk_prob=True,
        attention_bias=fields.has_tensor("blk.0.attn_output.bias"),
    )


_MLP = "layers.{layer}.mlp"

_STEMS = {
    "ffn_gate_inp": f"{_MLP}.gate",
    "ffn_gate_exps": f"{_MLP}.experts.{{expert}}.gate_proj",
    "ffn_up_exps": f"{_MLP}.experts.{{expert}}.up_proj",
    "ffn_down_exps": f"{_MLP}.experts.{{expert}}.down_proj",
}

ARCHITECTURE = Architecture("qwen3moe", read_config, MODEL_STEMS, LAYER_STEMS | QK_NORM_STEMS | _STEMS)
