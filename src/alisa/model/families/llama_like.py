"""What LLaMA, Mistral and Qwen share: rotary positions, RMS norms, a gated MLP, and the weight names of LLaMA."""

from __future__ import annotations

from dataclasses import dataclass

from alisa.model.families.family import WeightPiece, joined, same
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec

PREFIXES = ("model.",)

MODEL_PARTS: dict[str, tuple[WeightPiece, ...]] = {
    "embed.weight": (WeightPiece("embed_tokens.weight"),),
    "final_norm.weight": (WeightPiece("norm.weight"),),
    "output.weight": (WeightPiece("lm_head.weight"),),
}

_ATTENTION = "layers.{layer}.self_attn"
_MLP = "layers.{layer}.mlp"

LAYER_PARTS: dict[str, tuple[WeightPiece, ...]] = {
    **same(
        attn_norm="layers.{layer}.input_layernorm",
        q=f"{_ATTENTION}.q_proj",
        q_norm=f"{_ATTENTION}.q_norm",
        k_norm=f"{_ATTENTION}.k_norm",
        out=f"{_ATTENTION}.o_proj",
        mlp_norm="layers.{layer}.post_attention_layernorm",
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
    """The default when the config has none, as in the family's config class."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """The default when the config has none; None: hidden size over heads."""
    num_kv_heads: int | None = None
    """The default when the config has none; None: one for each query head."""


def read_spec(reader: ConfigReader, variant: LlamaVariant, *, window: int | None) -> ModelSpec:
    """The spec of a LLaMA-like config.

    Args:
        reader: the config; its problems so far are raised here.
        variant: the family's own choices and defaults.
        window: tokens a sliding-window layer attends to, or None. Up to that length a window is full attention, so the
            longest sequence is limited to it and full attention stays exact.

    Raises:
        ModelError: with all reasons at once.
    """
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    head_dim = reader.optional_integer("head_dim") or variant.head_dim
    head_dim = head_dim or reader.heads(hidden_size=hidden_size, num_heads=num_heads)
    max_positions = reader.integer("max_position_embeddings", variant.max_positions)
    num_layers = reader.integer("num_hidden_layers")
    num_kv_heads = reader.kv_heads("num_key_value_heads", variant.num_kv_heads, num_heads=num_heads)
    ffn_size = reader.integer("intermediate_size")
    vocab_size = reader.integer("vocab_size")
    norm_eps = reader.number("rms_norm_eps", 1e-6)
    activation = reader.activation("hidden_act", "silu")
    rope = reader.rope(head_dim, theta_name="rope_theta", part_name="partial_rotary_factor", part=1.0)
    tied = reader.flag("tie_word_embeddings", False)
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
        max_positions=max_positions if window is None else min(max_positions, window),
        norm="rmsnorm",
        norm_eps=norm_eps,
        activation=activation,
        gated_mlp=True,
        rope=rope,
        qkv_bias=variant.qkv_bias,
        out_bias=variant.out_bias,
        mlp_bias=variant.mlp_bias,
        qk_norm=variant.qk_norm,
        tied_embeddings=tied,
    )


def qwen_window(reader: ConfigReader) -> int | None:
    """The sliding window of a Qwen config, when it is switched on and at least one layer uses it."""
    if not reader.flag("use_sliding_window", False):
        return None
    first_windowed = reader.integer("max_window_layers", 28)
    windowed = first_windowed < reader.integer("num_hidden_layers")
    return reader.integer("sliding_window", 4096) if windowed else None
