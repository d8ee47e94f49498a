"""Bytes: what weights, activations, rows, hidden states and the selection policy take, for every family."""

from __future__ import annotations

import math

from alisa.config import PolicyName, WeightFormat
from alisa.model.names import layer_shapes, model_shapes, panel_bytes, stays_wide
from alisa.model.names import weight_bytes as float_weight_bytes
from alisa.policy.registry import POLICIES
from alisa.spec import DTYPE_BYTES, ModelSpec, RowFormat


def weight_bytes(spec: ModelSpec, dtype: str, *, packs_tied: bool, weight_dtype: WeightFormat = "float") -> int:
    """As `Decoder.weight_bytes`: every tensor, and a tied table twice where it is packed for the logits."""
    layers = dtype if weight_dtype == "float" else weight_dtype
    if weight_dtype == "float" and not (packs_tied and dtype in ("float32", "bfloat16")):
        again = spec.vocab_size * spec.token_embed_dim if packs_tied and spec.tied_embeddings else 0
        return float_weight_bytes(spec, DTYPE_BYTES[dtype]) + again * DTYPE_BYTES[dtype]
    return _panel_weight_bytes(spec, dtype, layers, head=layers if layers == dtype else "int8")


def _panel_weight_bytes(spec: ModelSpec, dtype: str, layers: str, head: str) -> int:
    """Linear layers in panels, biases in float32, tables and norms in `dtype`; the logits' layer is never shared."""

    def of(name: str, shape: tuple[int, ...]) -> int:
        if name.endswith("router.weight"):
            return panel_bytes(dtype, *shape) if dtype != "float16" else math.prod(shape) * DTYPE_BYTES[dtype]
        if len(shape) == 2 and name not in ("embed.weight", "positions.weight"):
            parts = 2 if spec.gated_mlp and name.endswith("up.weight") else 1
            return panel_bytes(head if name == "output.weight" else layers, *shape, parts)
        is_bias = name.endswith(".bias") and "norm" not in name and "router" not in name
        is_wide = stays_wide(spec, name) or is_bias
        return math.prod(shape) * (4 if is_wide else DTYPE_BYTES[dtype])

    layer = sum(of(name, shape) for name, shape in layer_shapes(spec).items())
    rest = sum(of(name, shape) for name, shape in model_shapes(spec).items())
    again = panel_bytes(head, spec.vocab_size, spec.token_embed_dim) if spec.tied_embeddings else 0
    return spec.num_layers * layer + rest + again


def kv_token_bytes(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one token's rows over all layers, scales included."""
    return spec.num_layers * row_bytes(spec, kv_dtype)


def row_bytes(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one token of one layer."""
    return RowFormat(kv_dtype, spec.num_kv_heads, spec.head_dim).row_bytes


def hidden_row_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the layer input that a deleted row is rebuilt from."""
    return spec.hidden_size * DTYPE_BYTES[dtype]


def activation_bytes(spec: ModelSpec, dtype: str, batch: int, pass_tokens: int) -> int:
    """The most that is held in addition to weights and rows: one layer's values of a pass, or the logits of the batch.

    A layer holds the residual sum, its norm, q, k, v, the attention output and the widened MLP at the same time; with
    experts, what each of a token's experts gave, in float32 too. All tokens may have chosen the same expert.
    """
    widened = spec.ffn_size * (3 if spec.gated_mlp else 2)
    widened += 3 * spec.experts_per_token * spec.hidden_size
    values = 3 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + widened
    logits = batch * spec.vocab_size * (4 + DTYPE_BYTES[dtype])
    return max(pass_tokens * values * DTYPE_BYTES[dtype], logits)


def policy_bytes(spec: ModelSpec, policy: PolicyName, sparsity: float, max_num_seqs: int, length: int) -> int:
    """As `PolicyState.nbytes` with `max_num_seqs` sequences of `length` tokens, none ever longer."""
    return POLICIES[policy].total_state_bytes(spec.attention, sparsity, max_num_seqs, length)
