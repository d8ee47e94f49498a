"""GPT-NeoX and Pythia: a parallel residual, rotation of a part of each head, and q, k, v fused head by head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from alisa.model.families.family import Family, WeightPiece, same
from alisa.model.families.reading import ConfigReader
from alisa.model.families.rope_fields import longest
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a GPT-NeoX config."""
    reader = ConfigReader(config, "gpt_neox")
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    head_dim = reader.heads(hidden_size=hidden_size, num_heads=num_heads)
    num_layers = reader.integer("num_hidden_layers")
    ffn_size = reader.integer("intermediate_size")
    vocab_size = reader.integer("vocab_size")
    max_positions = reader.integer("max_position_embeddings", 2048)
    norm_eps = reader.number("layer_norm_eps", 1e-5)
    activation = reader.activation("hidden_act", "gelu")
    rope = reader.rope(head_dim, max_positions, theta_name="rotary_emb_base", part_name="rotary_pct", part=0.25)
    attention_bias = reader.flag("attention_bias", True)
    parallel = reader.flag("use_parallel_residual", True)
    tied = reader.flag("tie_word_embeddings", False)
    reader.finish()
    return ModelSpec(
        family="gpt_neox",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=longest(rope, max_positions),
        norm="layernorm",
        norm_eps=norm_eps,
        activation=activation,
        gated_mlp=False,
        rope=rope,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=True,
        parallel_residual=parallel,
        tied_embeddings=tied,
    )


def _rows(which: int) -> Callable[[Tensor, ModelSpec], Tensor]:
    """Rows of q (0), k (1) or v (2) out of the fused tensor, whose rows are `[H, 3, D]`."""

    def take(fused: Tensor, spec: ModelSpec) -> Tensor:
        rows = fused.view(spec.num_heads, 3, spec.head_dim, *fused.shape[1:])[:, which]
        return rows.reshape(spec.q_size, *fused.shape[1:])

    return take


_LAYER = "layers.{layer}"
_FUSED = f"{_LAYER}.attention.query_key_value"

FAMILY = Family(
    "gpt_neox",
    to_spec,
    model_parts={
        "embed.weight": (WeightPiece("embed_in.weight"),),
        "output.weight": (WeightPiece("lm_head.weight"),),
        **same(final_norm="final_layer_norm"),
    },
    layer_parts={
        "q.weight": (WeightPiece(f"{_FUSED}.weight", _rows(0)),),
        "q.bias": (WeightPiece(f"{_FUSED}.bias", _rows(0)),),
        "kv.weight": (WeightPiece(f"{_FUSED}.weight", _rows(1)), WeightPiece(f"{_FUSED}.weight", _rows(2))),
        "kv.bias": (WeightPiece(f"{_FUSED}.bias", _rows(1)), WeightPiece(f"{_FUSED}.bias", _rows(2))),
        **same(
            attn_norm=f"{_LAYER}.input_layernorm",
            out=f"{_LAYER}.attention.dense",
            mlp_norm=f"{_LAYER}.post_attention_layernorm",
            up=f"{_LAYER}.mlp.dense_h_to_4h",
            down=f"{_LAYER}.mlp.dense_4h_to_h",
        ),
    },
    prefixes=("gpt_neox.",),
    aliases={"embed_out.weight": "lm_head.weight"},
)
