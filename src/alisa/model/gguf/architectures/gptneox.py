"""GPT-NeoX and Pythia: all rows of q, then of k, then of v, while the checkpoints on the hub go head by head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.gguf.architectures.architecture import (
    Architecture,
    common_config,
    rope_scaling,
    rotary_part,
    without_none,
)
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """GPT-NeoX's config."""
    config = common_config(fields)
    # All heads are query heads, and their length follows from the hidden size.
    del config["num_key_value_heads"]
    return config | without_none(
        model_type="gpt_neox",
        layer_norm_eps=fields.get("attention.layer_norm_epsilon"),
        use_parallel_residual=fields.get("use_parallel_residual"),
        rotary_pct=rotary_part(fields),
        rotary_emb_base=fields.get("rope.freq_base"),
        rope_scaling=rope_scaling(fields),
    )


def _head_by_head(rows: Tensor, spec: ModelSpec) -> Tensor:
    """Rows `[3, H, D]` as `[H, 3, D]`."""
    parts = rows.view(3, spec.num_heads, spec.head_dim, *rows.shape[1:])
    return parts.transpose(0, 1).reshape(rows.shape)


ARCHITECTURE = Architecture(
    "gptneox",
    read_config,
    model_stems={"token_embd": "embed_in", "output_norm": "final_layer_norm", "output": "lm_head"},
    layer_stems={
        "attn_norm": "layers.{layer}.input_layernorm",
        "attn_qkv": "layers.{layer}.attention.query_key_value",
        "attn_output": "layers.{layer}.attention.dense",
        "ffn_norm": "layers.{layer}.post_attention_layernorm",
        "ffn_up": "layers.{layer}.mlp.dense_h_to_4h",
        "ffn_down": "layers.{layer}.mlp.dense_4h_to_h",
    },
    restore={"attn_qkv": _head_by_head},
)
