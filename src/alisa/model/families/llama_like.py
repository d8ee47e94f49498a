"""What LLaMA and those built like it share: rotary positions, RMS norms, a gated MLP, and the weight names of LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from alisa.model.families.family import WeightPiece, joined, same
from alisa.model.families.reading import ConfigReader
from alisa.model.families.rope_fields import longest
from alisa.spec import ModelSpec

PREFIXES = ("model.",)

MODEL_PARTS: dict[str, tuple[WeightPiece, ...]] = {
    "embed.weight": (WeightPiece("embed_tokens.weight"),),
    "final_norm.weight": (WeightPiece("norm.weight"),),
    "output.weight": (WeightPiece("lm_head.weight"),),
}

_LAYER = "layers.{layer}"
_ATTENTION = f"{_LAYER}.self_attn"
_MLP = f"{_LAYER}.mlp"

LAYER_PARTS: dict[str, tuple[WeightPiece, ...]] = {
    **same(
        attn_norm=f"{_LAYER}.input_layernorm",
        q=f"{_ATTENTION}.q_proj",
        q_norm=f"{_ATTENTION}.q_norm",
        k_norm=f"{_ATTENTION}.k_norm",
        out=f"{_ATTENTION}.o_proj",
        mlp_norm=f"{_LAYER}.post_attention_layernorm",
        down=f"{_MLP}.down_proj",
    ),
    **joined("kv", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"),
    **joined("up", f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
}


@dataclass(frozen=True, slots=True)
class LlamaVariant:
    """What one member of the group does its own way; names of config fields are LLaMA's."""

    family: str
    max_positions: int
    """The default when the config has none, as in the family's config class; so are the next five."""
    head_dim: int | None = None
    """None: hidden size over heads."""
    num_kv_heads: int | None = None
    """None: one for each query head."""
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Defaults of the other sizes, in families whose configs leave them out; elsewhere they must be there."""
    activation_name: str = "hidden_act"
    """The config field that names the activation."""
    norm_eps_name: str = "rms_norm_eps"
    """The config field of the epsilon of the norms."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_place: Literal["before", "both", "after"] = "before"
    rope_kind: str | None = None
    """The entry of `rope_parameters` that the full layers use, where it has one for each kind."""
    theta: float = 10000.0
    """The default base of the rotation."""


def read_spec(reader: ConfigReader, variant: LlamaVariant) -> ModelSpec:
    """The spec of a LLaMA-like config, without what only some families have.

    Args:
        reader: the config; every field that the family reads itself has been read, and its problems are raised here.
        variant: the family's own choices and defaults.

    Raises:
        ModelError: with all reasons at once.
    """
    sizes = variant.sizes
    hidden_size = reader.integer("hidden_size", sizes.get("hidden_size"))
    num_heads = reader.integer("num_attention_heads", sizes.get("num_attention_heads"))
    head_dim = reader.optional_integer("head_dim") or variant.head_dim
    head_dim = head_dim or reader.heads(hidden_size=hidden_size, num_heads=num_heads)
    max_positions = reader.integer("max_position_embeddings", variant.max_positions)
    num_layers = reader.integer("num_hidden_layers", sizes.get("num_hidden_layers"))
    num_kv_heads = reader.kv_heads("num_key_value_heads", variant.num_kv_heads, num_heads=num_heads)
    ffn_size = reader.integer("intermediate_size", sizes.get("intermediate_size"))
    vocab_size = reader.integer("vocab_size", sizes.get("vocab_size"))
    norm_eps = reader.number(variant.norm_eps_name, variant.norm_eps)
    activation = reader.activation(variant.activation_name, variant.activation)
    rope = reader.rope(head_dim, max_positions, theta=variant.theta, kind=variant.rope_kind)
    tied = reader.flag("tie_word_embeddings", variant.tied)
    reader.finish()
    return ModelSpec(
        family=variant.family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=longest(rope, max_positions),
        norm="rmsnorm",
        norm_eps=norm_eps,
        activation=activation,
        gated_mlp=True,
        rope=rope,
        qkv_bias=variant.qkv_bias,
        out_bias=variant.out_bias,
        mlp_bias=variant.mlp_bias,
        qk_norm=variant.qk_norm,
        norm_place=variant.norm_place,
        tied_embeddings=tied,
    )


def qwen_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    """The sliding windows of a Qwen config: switched on or not, and by `layer_types` or else from a layer on."""
    num_layers = reader.integer("num_hidden_layers")
    is_on, window = reader.flag("use_sliding_window", False), reader.window(4096)
    first = reader.integer("max_window_layers", 28, least=0)
    return reader.windows(num_layers, window if is_on else None, lambda layer: layer >= first)
