"""GPT-2: learned positions, and weights stored as `[in, out]` with q, k and v side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from alisa.model.families.family import Family, WeightPiece, same
from alisa.model.families.reading import ConfigReader
from alisa.spec import ModelSpec


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a GPT-2 config."""
    reader = ConfigReader(config, "gpt2")
    hidden_size = reader.integer("n_embd", 768)
    num_heads = reader.integer("n_head", 12)
    head_dim = reader.heads(hidden_size=hidden_size, num_heads=num_heads)
    num_layers = reader.integer("n_layer", 12)
    ffn_size = reader.integer("n_inner", 4 * hidden_size)
    vocab_size = reader.integer("vocab_size", 50257)
    max_positions = reader.integer("n_positions", 1024)
    norm_eps = reader.number("layer_norm_epsilon", 1e-5)
    activation = reader.activation("activation_function", "gelu_new")
    tied = reader.flag("tie_word_embeddings", True)
    reader.fixed("scale_attn_weights", True)
    reader.fixed("scale_attn_by_inverse_layer_idx", False)
    reader.fixed("add_cross_attention", False)
    reader.finish()
    return ModelSpec(
        family="gpt2",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        norm="layernorm",
        norm_eps=norm_eps,
        activation=activation,
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=tied,
    )


def _transposed(weight: Tensor, spec: ModelSpec) -> Tensor:
    """`[in, out]` as `[out, in]`."""
    return weight.t()


def _columns(start: int, end: int) -> Callable[[Tensor, ModelSpec], Tensor]:
    """Columns `[start, end)`, in multiples of C, of the fused q, k, v: `[C, 3C]` or, for the bias, `[3C]`."""

    def take(fused: Tensor, spec: ModelSpec) -> Tensor:
        columns = fused[..., start * spec.q_size : end * spec.q_size]
        return columns.t() if columns.dim() == 2 else columns

    return take


_LAYER = "h.{layer}"
_FUSED = f"{_LAYER}.attn.c_attn"


def _linear(ours: str, theirs: str) -> dict[str, tuple[WeightPiece, ...]]:
    """Parts of a layer whose weight is stored transposed."""
    return {
        f"{ours}.weight": (WeightPiece(f"{_LAYER}.{theirs}.weight", _transposed),),
        f"{ours}.bias": (WeightPiece(f"{_LAYER}.{theirs}.bias"),),
    }


FAMILY = Family(
    "gpt2",
    to_spec,
    model_parts={
        "embed.weight": (WeightPiece("wte.weight"),),
        "positions.weight": (WeightPiece("wpe.weight"),),
        "output.weight": (WeightPiece("lm_head.weight"),),
        **same(final_norm="ln_f"),
    },
    layer_parts={
        **same(attn_norm=f"{_LAYER}.ln_1", mlp_norm=f"{_LAYER}.ln_2"),
        "q.weight": (WeightPiece(f"{_FUSED}.weight", _columns(0, 1)),),
        "q.bias": (WeightPiece(f"{_FUSED}.bias", _columns(0, 1)),),
        "kv.weight": (WeightPiece(f"{_FUSED}.weight", _columns(1, 3)),),
        "kv.bias": (WeightPiece(f"{_FUSED}.bias", _columns(1, 3)),),
        **_linear("out", "attn.c_proj"),
        **_linear("up", "mlp.c_fc"),
        **_linear("down", "mlp.c_proj"),
    },
    prefixes=("transformer.",),
    aliases={},
)
