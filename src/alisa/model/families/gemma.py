"""What Gemma 2 and 3 share: norms, four in each layer, that are stored as their distance from 1."""

from __future__ import annotations

from torch import Tensor

from alisa.model.families.family import WeightPiece
from alisa.model.families.llama_like import LAYER_PARTS, MODEL_PARTS
from alisa.spec import ModelSpec


def plus_one(weight: Tensor, spec: ModelSpec) -> Tensor:
    """The factor of a norm, in float32: in 16 bits 1 + w would lose most of w."""
    return weight.float() + 1.0


def _norm(theirs: str) -> tuple[WeightPiece, ...]:
    return (WeightPiece(f"{theirs}.weight", plus_one),)


_LAYER = "layers.{layer}"

GEMMA_MODEL_PARTS = MODEL_PARTS | {"final_norm.weight": _norm("norm")}
GEMMA_LAYER_PARTS = LAYER_PARTS | {
    "attn_norm.weight": _norm(f"{_LAYER}.input_layernorm"),
    "attn_post_norm.weight": _norm(f"{_LAYER}.post_attention_layernorm"),
    "mlp_norm.weight": _norm(f"{_LAYER}.pre_feedforward_layernorm"),
    "mlp_post_norm.weight": _norm(f"{_LAYER}.post_feedforward_layernorm"),
    "q_norm.weight": _norm(f"{_LAYER}.self_attn.q_norm"),
    "k_norm.weight": _norm(f"{_LAYER}.self_attn.k_norm"),
}
