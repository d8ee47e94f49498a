"""LLaMA, Mistral, Mixtral and what was published in their form."""

from __future__ import annotations

from typing import Any

from alisa.model.gguf.architectures.architecture import Architecture, without_none
from alisa.model.gguf.architectures.llama_like import HALF_SPLIT, LAYER_STEMS, MODEL_STEMS, biases, interleaved_config
from alisa.model.gguf.fields import ArchitectureFields


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """Mixtral's config when the file has experts, Mistral's when it has a sliding window, LLaMA's otherwise."""
    config = interleaved_config(fields)
    window, experts = fields.get("attention.sliding_window"), fields.get("expert_count")
    if experts:
        return config | without_none(
            model_type="mixtral",
            num_local_experts=experts,
            num_experts_per_tok=fields.get("expert_used_count"),
            sliding_window=window,
        )
    if window:
        return config | {"model_type": "mistral", "sliding_window": window}
    return config | biases(fields) | {"model_type": "llama"}


_MOE = "layers.{layer}.block_sparse_moe"

_EXPERT_STEMS = {
    "ffn_gate_inp": f"{_MOE}.gate",
    "ffn_gate_exps": f"{_MOE}.experts.{{expert}}.w1",
    "ffn_up_exps": f"{_MOE}.experts.{{expert}}.w3",
    "ffn_down_exps": f"{_MOE}.experts.{{expert}}.w2",
}

ARCHITECTURE = Architecture("llama", read_config, MODEL_STEMS, LAYER_STEMS | _EXPERT_STEMS, HALF_SPLIT)
