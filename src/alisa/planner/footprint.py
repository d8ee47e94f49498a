"""Bytes: what weights, activations, rows, remnants and the selection policy take, for every family."""

from __future__ import annotations

import math

from alisa.budget import Budget
from alisa.config import PolicyName, WeightDtypeName
from alisa.model.names import layer_shapes, model_shapes, num_weights, quantised_bytes
from alisa.spec import DTYPE_BYTES, ModelSpec, RowFormat

SKETCH_BITS = {"sketch": 4, "sketch-plain": 4, "sketch-head": 4, "sketch-2bit": 2, "sketch-8bit": 8}
_SWA_BUCKETS = 64
"""As `SparseWindow.max_buckets`; a test compares the bytes with a real state."""


def weight_bytes(spec: ModelSpec, dtype: str, *, packs_tied: bool, weight_dtype: WeightDtypeName = "auto") -> int:
    """As `Decoder.weight_bytes`: every tensor, and a tied table twice where it is packed for the logits."""
    if weight_dtype == "int8":
        return _int8_weight_bytes(spec, dtype)
    again = spec.vocab_size * spec.token_embed_dim if packs_tied and spec.tied_embeddings else 0
    return (num_weights(spec) + again) * DTYPE_BYTES[dtype]


def _int8_weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Linear layers in 8 bits, biases in float32, tables and norms in `dtype`; the logits' layer is never shared."""

    def of(name: str, shape: tuple[int, ...]) -> int:
        if len(shape) == 2 and name not in ("embed.weight", "positions.weight"):
            return quantised_bytes(*shape)
        return math.prod(shape) * (4 if name.endswith(".bias") and "norm" not in name else DTYPE_BYTES[dtype])

    layer = sum(of(name, shape) for name, shape in layer_shapes(spec).items())
    rest = sum(of(name, shape) for name, shape in model_shapes(spec).items())
    again = quantised_bytes(spec.vocab_size, spec.token_embed_dim) if spec.tied_embeddings else 0
    return spec.num_layers * layer + rest + again


def kv_token_bytes(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one token's rows over all layers, scales included."""
    return spec.num_layers * row_bytes(spec, kv_dtype)


def row_bytes(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes of one token of one layer."""
    return RowFormat(kv_dtype, spec.num_kv_heads, spec.head_dim).row_bytes


def remnant_row_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the layer input that a deleted row is rebuilt from."""
    return spec.hidden_size * DTYPE_BYTES[dtype]


def activation_bytes(spec: ModelSpec, dtype: str, batch: int, pass_tokens: int) -> int:
    """The most that is held in addition to weights and rows: one layer's values of a pass, or the logits of the batch.

    A layer holds the residual sum, its norm, q, k, v, the attention output and the widened MLP at the same time.
    """
    widened = spec.ffn_size * (3 if spec.gated_mlp else 2)
    values = 3 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + widened
    logits = batch * spec.vocab_size * (4 + DTYPE_BYTES[dtype])
    return max(pass_tokens * values * DTYPE_BYTES[dtype], logits)


def policy_bytes(spec: ModelSpec, policy: PolicyName, sparsity: float, max_num_seqs: int, capacity: int) -> int:
    """As `PolicyState.nbytes` for these policies; those without a state of note count as nothing."""
    tokens = spec.num_layers * max_num_seqs * capacity
    if policy in SKETCH_BITS:
        means = 0 if policy == "sketch-plain" else 8 * spec.num_layers * max_num_seqs * spec.kv_size
        return tokens * spec.num_kv_heads * (math.ceil(spec.head_dim * SKETCH_BITS[policy] / 8) + 4) + means
    if policy in ("swa", "swa-head"):
        widest = Budget(sparsity).recent(capacity)
        bucket_rows = -(-widest // _SWA_BUCKETS)
        num_sets = spec.num_kv_heads if policy == "swa-head" else 1
        return tokens * num_sets * (8 + 4 * (-(-widest // bucket_rows) + 2))
    return 0
