"""Shapes of models that people ask about, so that a plan needs no files at all; sizes from their published configs."""

from __future__ import annotations

from alisa.spec import ModelSpec, Rope


def opt_shape(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int = 50272) -> ModelSpec:
    """OPT (arXiv 2205.01068, table 1), or a model built like it."""
    return ModelSpec(
        family="opt",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_positions=2048,
        norm="layernorm",
        norm_eps=1e-5,
        activation="relu",
        gated_mlp=False,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        position_offset=2,
    )


def llama_shape(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, ffn_size: int, vocab_size: int = 32000
) -> ModelSpec:
    """LLaMA (arXiv 2302.13971, table 2), or a model built like it."""
    return ModelSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        max_positions=2048,
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        rope=Rope(10000.0, hidden_size // num_heads),
        tied_embeddings=False,
    )


def _pythia(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int) -> ModelSpec:
    """Pythia (arXiv 2304.01373, table 1)."""
    return ModelSpec(
        family="gpt_neox",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        ffn_size=4 * hidden_size,
        vocab_size=vocab_size,
        max_positions=2048,
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu",
        gated_mlp=False,
        rope=Rope(10000.0, hidden_size // num_heads // 4),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        parallel_residual=True,
        tied_embeddings=False,
    )


SHAPES: dict[str, ModelSpec] = {
    "opt-125m": opt_shape(12, 768, 12),
    "opt-1.3b": opt_shape(24, 2048, 32),
    "opt-6.7b": opt_shape(32, 4096, 32),
    "opt-13b": opt_shape(40, 5120, 40),
    "opt-30b": opt_shape(48, 7168, 56),
    "llama-1.1b": llama_shape(22, 2048, 32, 4, 5632),
    "llama-7b": llama_shape(32, 4096, 32, 32, 11008),
    "llama-13b": llama_shape(40, 5120, 40, 40, 13824),
    "llama-33b": llama_shape(60, 6656, 52, 52, 17920),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
}
"""By the name that `alisa plan --shape` takes."""
