"""What LLaMA, Qwen, Gemma and others share: names of tensors in GGUF and on the hub, biases, and the order of rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.gguf.architectures.architecture import Restore, rms_norm_config
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec

MODEL_STEMS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}

_ATTENTION = "layers.{layer}.self_attn"
_MLP = "layers.{layer}.mlp"

LAYER_STEMS = {
    "attn_norm": "layers.{layer}.input_layernorm",
    "attn_q": f"{_ATTENTION}.q_proj",
    "attn_k": f"{_ATTENTION}.k_proj",
    "attn_v": f"{_ATTENTION}.v_proj",
    "attn_output": f"{_ATTENTION}.o_proj",
    "ffn_norm": "layers.{layer}.post_attention_layernorm",
    "ffn_gate": f"{_MLP}.gate_proj",
    "ffn_up": f"{_MLP}.up_proj",
    "ffn_down": f"{_MLP}.down_proj",
}
QK_NORM_STEMS = {"attn_q_norm": f"{_ATTENTION}.q_norm", "attn_k_norm": f"{_ATTENTION}.k_norm"}


def biases(fields: ArchitectureFields) -> dict[str, Any]:
    """Which of the two kinds of biases a model has, by the tensors of its first layer."""
    return {
        "attention_bias": fields.has_tensor("blk.0.attn_output.bias"),
        "mlp_bias": fields.has_tensor("blk.0.ffn_down.bias"),
    }


def interleaved_config(fields: ArchitectureFields) -> dict[str, Any]:
    """`rms_norm_config` of an architecture whose rows of q and k are in the order of interleaved rotation."""
    config = rms_norm_config(fields)
    if "partial_rotary_factor" in config:
        fields.refuse("rope.dimension_count", "the length of a head is supported")
    return config


def _half_split(of_keys: bool) -> Restore:
    """Rows of each head from the interleaved order (0, D/2, 1, D/2 + 1, ...) to the half-split one."""

    def restore(rows: Tensor, spec: ModelSpec) -> Tensor:
        num_heads = spec.num_kv_heads if of_keys else spec.num_heads
        pairs = rows.view(num_heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)

    return restore


HALF_SPLIT = {"attn_q": _half_split(of_keys=False), "attn_k": _half_split(of_keys=True)}
"""What undoes the interleaved order."""
