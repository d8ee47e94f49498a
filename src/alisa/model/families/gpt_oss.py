"""GPT-OSS (2508.10925): a logit in each head's softmax that reads nothing, windows in every other layer, and experts.

The published files hold their experts in MXFP4 (`alisa.model.packed`), and transformers writes them in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from alisa.model.families.family import Family, WeightPiece
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS, PREFIXES, LlamaVariant, read_spec
from alisa.model.families.reading import ConfigReader
from alisa.spec import SWIGLU_ALPHA, SWIGLU_LIMIT, ModelSpec

_SIZES = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def to_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a GPT-OSS config."""
    given = {"rope_parameters": _ROPE} | {name: value for name, value in config.items() if value is not None}
    reader = ConfigReader(given, "gpt_oss", quantised=("mxfp4",))
    num_layers = reader.integer("num_hidden_layers", _SIZES["num_hidden_layers"])
    windows = reader.windows(num_layers, reader.window(128), lambda layer: layer % 2 == 0)
    num_experts, per_token = reader.experts(128, 4)
    bias = reader.flag("attention_bias", True)
    reader.fixed("swiglu_alpha", SWIGLU_ALPHA)
    reader.fixed("swiglu_limit", SWIGLU_LIMIT)
    # Said twice: num_experts_per_tok counts. How long prompts were in training is not asked for.
    reader.ignore("experts_per_token", "initial_context_length")
    variant = LlamaVariant(
        "gpt_oss",
        max_positions=131072,
        head_dim=64,
        num_kv_heads=8,
        norm_eps=1e-5,
        sizes=_SIZES,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        theta=150000.0,
    )
    return replace(
        read_spec(reader, variant),
        activation="clamped_swiglu",
        windows=windows,
        num_experts=num_experts,
        experts_per_token=per_token,
        router_bias=True,
        has_sinks=True,
    )


def _every_other(first: int) -> Callable[[Tensor, ModelSpec], Tensor]:
    """Rows first, first + 2, ... of a matrix that is stored as `[in, out]`, or of a bias."""
    return lambda fused, spec: (fused.t() if fused.dim() == 2 else fused)[first::2]


def _turned(stored: Tensor, spec: ModelSpec) -> Tensor:
    return stored.t()


_MLP = "layers.{layer}.mlp"


def _up(name: str) -> tuple[WeightPiece, ...]:
    """Gate and up, whose rows are stored in turns."""
    return tuple(WeightPiece(f"{_MLP}.experts.{name}", _every_other(first), of_all_experts=True) for first in (0, 1))


_PARTS = {
    **LAYER_PARTS,
    "sinks": (WeightPiece("layers.{layer}.self_attn.sinks"),),
    "router.weight": (WeightPiece(f"{_MLP}.router.weight"),),
    "router.bias": (WeightPiece(f"{_MLP}.router.bias"),),
    "experts.{expert}.up.weight": _up("gate_up_proj"),
    "experts.{expert}.up.bias": _up("gate_up_proj_bias"),
    "experts.{expert}.down.weight": (WeightPiece(f"{_MLP}.experts.down_proj", _turned, of_all_experts=True),),
    "experts.{expert}.down.bias": (WeightPiece(f"{_MLP}.experts.down_proj_bias", of_all_experts=True),),
}

FAMILY = Family("gpt_oss", to_spec, MODEL_PARTS, _PARTS, PREFIXES, aliases={})
