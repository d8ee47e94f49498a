"""GPT-2: matrices are `[out, in]`, while its checkpoints on the hub have them transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alisa.model.gguf.architectures.architecture import Architecture, without_none
from alisa.model.gguf.fields import ArchitectureFields
from alisa.spec import ModelSpec


def read_config(fields: ArchitectureFields) -> dict[str, Any]:
    """GPT-2's config."""
    return without_none(
        model_type="gpt2",
        n_layer=fields.get("block_count"),
        n_embd=fields.get("embedding_length"),
        n_inner=fields.get("feed_forward_length"),
        n_head=fields.get("attention.head_count"),
        n_positions=fields.get("context_length"),
        vocab_size=fields.num_rows("token_embd.weight"),
        layer_norm_epsilon=fields.get("attention.layer_norm_epsilon"),
        tie_word_embeddings=not fields.has_tensor("output.weight"),
    )


def _transposed(tensor: Tensor, spec: ModelSpec) -> Tensor:
    """`[out, in]` as `[in, out]`, a view; a bias as it is."""
    return tensor.t()


ARCHITECTURE = Architecture(
    "gpt2",
    read_config,
    model_stems={"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"},
    layer_stems={
        "attn_norm": "h.{layer}.ln_1",
        "attn_qkv": "h.{layer}.attn.c_attn",
        "attn_output": "h.{layer}.attn.c_proj",
        "ffn_norm": "h.{layer}.ln_2",
        "ffn_up": "h.{layer}.mlp.c_fc",
        "ffn_down": "h.{layer}.mlp.c_proj",
    },
    restore=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _transposed),
)
