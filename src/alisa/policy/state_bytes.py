"""What the states of the policies take, in bytes: no torch, so that a plan can count them.

A test compares each with a state that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from alisa.budget import Budget
from alisa.spec import PART_LEN, AttentionShape

MAX_BUCKETS = 64
"""Buckets of rows that a window of the local sum of `swa` is kept in."""

VALUE_BITS = 2
"""Of a value in the sketch of `sketch`."""

KeyBits = Literal["auto", 2, 4, 8]
"""Of a value in the sketch of a key; auto: 4, and 8 in a head of more than `LONG_HEAD` values."""

LONG_HEAD = 128
"""Longer heads are cut into parts of at most `PART_LEN` values with a range each (`num_parts`). One range for all of
them is too coarse: with heads of 256 (Gemma 3 270M) and 4 bits `sketch` lost 6.9 % of perplexity at 0.95
(docs/accuracy.md)."""


def key_bits(bits: KeyBits, head_dim: int) -> int:
    """Bits of a value in the sketch of keys of this length."""
    return (8 if head_dim > LONG_HEAD else 4) if bits == "auto" else bits


def num_parts(head_dim: int) -> int:
    """Equal parts of a head that have ranges of their own in a sketch."""
    if head_dim <= LONG_HEAD:
        return 1
    return next(parts for parts in range(-(-head_dim // PART_LEN), head_dim + 1) if head_dim % parts == 0)


class StateBytes(NamedTuple):
    """Memory of a policy's state."""

    per_token: int = 0
    per_sequence: int = 0


StateSize = Callable[[AttentionShape, Budget, int], StateBytes]
"""shape, budget, longest sequence -> bytes."""


def num_buckets(budget: Budget, max_len: int) -> int:
    """How many parts the local sum of `swa` is kept in, for sequences of at most `max_len` tokens.

    One more than the window covers when it begins inside a bucket, and one for the row that is being added.
    """
    return min(budget.recent(max_len), MAX_BUCKETS) + 2


def no_state(shape: AttentionShape, budget: Budget, max_len: int) -> StateBytes:
    """Nothing is kept between steps."""
    return StateBytes()


def sums_state(shape: AttentionShape, budget: Budget, max_len: int) -> StateBytes:
    """`h2o`: a sum in float64 for each layer."""
    return StateBytes(8 * shape.num_layers)


def window_state(*, per_head: bool) -> StateSize:
    """`swa`: a sum in float64 and buckets in float32 for each index set of each layer."""

    def size(shape: AttentionShape, budget: Budget, max_len: int) -> StateBytes:
        num_sets = shape.num_kv_heads if per_head else 1
        return StateBytes(shape.num_layers * num_sets * (8 + 4 * num_buckets(budget, max_len)))

    return size


def sketch_state(*, bits: KeyBits | None, uses_values: bool, uses_mean: bool) -> StateSize:
    """`sketch`: for each KV head codes and two float16 of the key and of the value, or the key in float32.

    Sums of values are in float64.
    """

    def size(shape: AttentionShape, budget: Budget, max_len: int) -> StateBytes:
        head_dim = shape.head_dim
        key_bytes = 4 * head_dim if bits is None else _sketch_bytes(head_dim, key_bits(bits, head_dim))
        value_bytes = _sketch_bytes(shape.head_dim, VALUE_BITS) if uses_values else 0
        means = 8 * shape.num_layers * shape.kv_size if uses_mean else 0
        return StateBytes(shape.num_layers * shape.num_kv_heads * (key_bytes + value_bytes), means)

    return size


def _sketch_bytes(head_dim: int, bits: int) -> int:
    """Of one head: codes, and for each part of it a step and a minimum in float16."""
    parts = num_parts(head_dim)
    return parts * (-(-head_dim // parts * bits // 8) + 4)
