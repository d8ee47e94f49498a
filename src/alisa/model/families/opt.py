"""OPT (2205.01068): learned positions that start at row 2, and at 350M a narrow embedding and norms after the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alisa.model.families.family import Family, WeightPiece, joined, same
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read an OPT config."""
    reader = ConfigReader(config, "opt")
    hidden_size = reader.integer("hidden_size", 768)
    num_heads = reader.integer("num_attention_heads", 12)
    head_dim = reader.heads(hidden_size=hidden_size, num_heads=num_heads)
    num_layers = reader.integer("num_hidden_layers", 12)
    ffn_size = reader.integer("ffn_dim", 3072)
    vocab_size = reader.integer("vocab_size", 50272)
    max_positions = reader.integer("max_position_embeddings", 2048)
    activation = reader.activation("activation_function", "relu")
    embed_dim = reader.optional_integer("word_embed_proj_dim")
    bias = reader.flag("enable_bias", True)
    tied = reader.flag("tie_word_embeddings", True)
    norm_first = reader.flag("do_layer_norm_before", True)
    reader.fixed("layer_norm_elementwise_affine", True)
    if norm_first:
        reader.fixed("_remove_final_layer_norm", False)
    reader.finish()
    return ModelSpec(
        family="opt",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        norm="layernorm",
        norm_eps=1e-5,
        activation=activation,
        gated_mlp=False,
        rope=None,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_place="before" if norm_first else "after_sum",
        position_offset=2,
        embed_dim=None if embed_dim == hidden_size else embed_dim,
        tied_embeddings=tied,
    )


_LAYER = "layers.{layer}"

FAMILY = Family(
    "opt",
    to_spec,
    model_parts={
        "embed.weight": (WeightPiece("embed_tokens.weight"),),
        "positions.weight": (WeightPiece("embed_positions.weight"),),
        "output.weight": (WeightPiece("lm_head.weight"),),
        **same(project_in="project_in", project_out="project_out", final_norm="final_layer_norm"),
    },
    layer_parts={
        **same(
            attn_norm=f"{_LAYER}.self_attn_layer_norm",
            q=f"{_LAYER}.self_attn.q_proj",
            out=f"{_LAYER}.self_attn.out_proj",
            mlp_norm=f"{_LAYER}.final_layer_norm",
            up=f"{_LAYER}.fc1",
            down=f"{_LAYER}.fc2",
        ),
        **joined("kv", f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.v_proj"),
    },
    # The .bin files of 2022 were saved from the bare decoder.
    prefixes=("model.decoder.", "decoder."),
    aliases={},
)
