"""What `alisa bench kernels` can measure, by name. Plain values without torch, so that `--help` can list them.

A case says what is done and how large it is; `decode`, `upkeep`, `ranking`, `products` build it. To add one: a line in
`CASES`. For another kind of work: a dataclass here, and a function that makes a `Case` of it (`bench/kernels.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from alisa.spec import RowFormat


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """Attention of one new token for each of B sequences of S tokens, of which a share is read."""

    dtype: str
    """Of the rows."""
    share: float
    num_seqs: int = 16
    num_tokens: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    num_sets: int = 1
    shuffled: bool = False
    """Rows of a sequence lie anywhere in the pool instead of one after the other."""

    @property
    def num_slots(self) -> int:
        """K: half recent, half older, and the token itself."""
        if self.share == 1.0:
            return self.num_tokens
        return 2 * round(self.num_tokens * self.share / 2) + 1

    @property
    def num_older(self) -> int:
        """Slots that are not the most recent ones."""
        return 0 if self.share == 1.0 else self.num_slots // 2

    @property
    def row_format(self) -> RowFormat:
        """Of the rows read."""
        return RowFormat(self.dtype, self.num_kv_heads, self.head_dim)

    @property
    def num_bytes(self) -> int:
        """Rows that must be read: of each index set its own heads only."""
        return self.num_seqs * self.num_slots * self.row_format.row_bytes


@dataclass(frozen=True, kw_only=True)
class AppendCase:
    """New K and V of N tokens become rows of one layer."""

    dtype: str
    """Of the rows; K and V come in bfloat16, or float32 for float32 rows."""
    num_tokens: int = 1024
    num_kv_heads: int = 32
    head_dim: int = 128

    @property
    def row_format(self) -> RowFormat:
        """Of the rows written."""
        return RowFormat(self.dtype, self.num_kv_heads, self.head_dim)

    @property
    def num_bytes(self) -> int:
        """K and V read, rows written."""
        value_bytes = 4 if self.dtype == "float32" else 2
        return self.num_tokens * (2 * self.num_kv_heads * self.head_dim * value_bytes + self.row_format.row_bytes)


@dataclass(frozen=True, kw_only=True)
class PolicyCase:
    """What the policy swa does for one layer of a decode step, apart from attention itself."""

    work: Literal["select", "observe"]
    """select: the older tokens with the largest local sums. observe: the step's mass goes into sum and bucket."""
    num_seqs: int = 16
    num_tokens: int = 2048
    sparsity: float = 0.8
    num_layers: int = 24
    """All of them are worked on in turn, so that each finds its state in memory and not in a cache."""


@dataclass(frozen=True, kw_only=True)
class SketchCase:
    """The sketch of one layer: ranking all tokens of B sequences with it, or adding the keys of new ones."""

    work: Literal["scores", "complete", "append"]
    """scores: weights by the keys. complete: a fifth chosen by these, and the values of the others added up. append: a
    sketch for every token there is, as a prompt has it."""
    bits: Literal[2, 4, 8] = 4
    num_seqs: int = 16
    num_tokens: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    num_sets: int = 1

    @property
    def key_bytes(self) -> int:
        """Of one token's sketch: codes, and a step and a minimum in float16 for each head."""
        return self.num_kv_heads * (-(-self.head_dim * self.bits // 8) + 4)

    @property
    def value_bytes(self) -> int:
        """Of one token's values in 2 bits."""
        return self.num_kv_heads * (-(-self.head_dim // 4) + 4)

    @property
    def num_bytes(self) -> int:
        """Scores and complete: sketches read, scores written. append: bfloat16 keys read, sketches written."""
        other_bytes = {
            "scores": 4 * self.num_sets,
            "complete": 4 * self.num_sets + self.value_bytes,
            "append": 2 * self.num_kv_heads * self.head_dim,
        }
        return self.num_seqs * self.num_tokens * (self.key_bytes + other_bytes[self.work])


@dataclass(frozen=True, kw_only=True)
class ProductCase:
    """One linear layer with weights in 8 bits, on N tokens in bfloat16."""

    num_tokens: int
    num_in: int = 2048
    num_out: int = 8192

    @property
    def num_bytes(self) -> int:
        """Weights read, inputs read and outputs written."""
        return self.num_in * self.num_out + 4 * self.num_out + 2 * self.num_tokens * (self.num_in + self.num_out)


CaseSpec: TypeAlias = DecodeCase | AppendCase | PolicyCase | SketchCase | ProductCase

CASES: dict[str, CaseSpec] = {
    "bf16-20": DecodeCase(dtype="bfloat16", share=0.2),
    "int8-20": DecodeCase(dtype="int8", share=0.2),
    "int4-20": DecodeCase(dtype="int4", share=0.2),
    "f32-20": DecodeCase(dtype="float32", share=0.2),
    "bf16-20-shuffled": DecodeCase(dtype="bfloat16", share=0.2, shuffled=True),
    "bf16-dense": DecodeCase(dtype="bfloat16", share=1.0),
    "f32-dense": DecodeCase(dtype="float32", share=1.0),
    "bf16-20-gqa": DecodeCase(dtype="bfloat16", share=0.2, num_kv_heads=8),
    "int8-20-gqa": DecodeCase(dtype="int8", share=0.2, num_kv_heads=8),
    "bf16-20-per-head": DecodeCase(dtype="bfloat16", share=0.2, num_kv_heads=8, num_sets=8),
    "bf16-20-b1-16k": DecodeCase(dtype="bfloat16", share=0.2, num_seqs=1, num_tokens=16384),
    "bf16-dense-b1-16k": DecodeCase(dtype="bfloat16", share=1.0, num_seqs=1, num_tokens=16384),
    "bf16-20-opt1.3b": DecodeCase(dtype="bfloat16", share=0.2, num_tokens=640, head_dim=64),
    "f32-20-opt1.3b": DecodeCase(dtype="float32", share=0.2, num_tokens=640, head_dim=64),
    "append-bf16": AppendCase(dtype="bfloat16"),
    "append-int8": AppendCase(dtype="int8"),
    "append-int4": AppendCase(dtype="int4"),
    "select": PolicyCase(work="select"),
    "observe": PolicyCase(work="observe"),
    "sketch": SketchCase(work="scores"),
    "sketch-2bit": SketchCase(work="scores", bits=2),
    "sketch-8bit": SketchCase(work="scores", bits=8),
    "sketch-gqa": SketchCase(work="scores", num_kv_heads=8),
    "sketch-per-head": SketchCase(work="scores", num_kv_heads=8, num_sets=8),
    "sketch-gqa-b1-16k": SketchCase(work="scores", num_kv_heads=8, num_seqs=1, num_tokens=16384),
    "sketch-opt1.3b": SketchCase(work="scores", num_tokens=640, head_dim=64),
    "sketch-values": SketchCase(work="complete"),
    "sketch-values-gqa": SketchCase(work="complete", num_kv_heads=8),
    "sketch-values-opt1.3b": SketchCase(work="complete", num_tokens=640, head_dim=64),
    "sketch-append": SketchCase(work="append", num_seqs=1, num_tokens=1024),
    "product-int8-b1": ProductCase(num_tokens=1),
    "product-int8-b4": ProductCase(num_tokens=4),
    "product-int8-b16": ProductCase(num_tokens=16),
    "product-int8-prefill": ProductCase(num_tokens=1024),
}
"""Every case by name."""

DEFAULT_CASES = (
    "bf16-20",
    "int8-20",
    "bf16-20-gqa",
    "append-bf16",
    "append-int8",
    "select",
    "observe",
    "sketch",
    "sketch-values",
    "product-int8-b16",
)
"""One of each kind, and the shapes most often asked about; under a minute on two cores."""
