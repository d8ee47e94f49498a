"""The bytes of rows as the kernels address them: `RowFormat` in units of the pointers they hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.spec import CODE_BITS, RowFormat

LOWEST = tl.constexpr(-3.0e38)
"""Below every score, and finite: the difference of two such maxima is 0, not NaN."""

_VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class RowView:
    """One layer's pool, twice: as values or codes, and as the float16 pairs of integer rows.

    A row is a whole number of elements of either, so that an address is a slot times a stride plus a place in the row.
    """

    values: Tensor
    """`[R, ...]` in the dtype of float rows, UInt8 for codes."""
    pairs: Tensor
    """Float16 `[R, row_bytes / 2]`; the values again where rows hold no scales."""
    k_len: int
    """Elements of `values` in one head of K."""
    v_len: int
    """And of V, which begins after all heads of K."""
    k_planes: int
    """Codes of K in a byte: 2 where they have 4 bits, else 1."""
    v_planes: int
    pairs_at: int
    """Element of `pairs` where the (scale, minimum) pairs of a row begin, G * P of K, then G * P of V."""
    coded: bool
    parts: int
    """P, as in `RowFormat`."""

    @classmethod
    def of(cls, rows: Tensor, row_format: RowFormat) -> RowView:
        """Views of rows UInt8[R, row_bytes]; no copy."""
        bits = CODE_BITS.get(row_format.dtype)
        if bits is not None:
            (k_len, v_len), (k_bits, v_bits) = row_format.head_bytes, bits
            pairs = rows.view(torch.float16)
            planes, pairs_at = (8 // k_bits, 8 // v_bits), row_format.pairs_at // 2
            return cls(rows, pairs, k_len, v_len, *planes, pairs_at, True, row_format.num_parts)
        values = rows.view(_VALUE_DTYPES[row_format.dtype])
        return cls(values, values, row_format.head_dim, row_format.head_dim, 1, 1, 0, False, 1)


@triton.jit
def load_tile(values_ptr: tl.tensor, places: tl.tensor, columns: tl.tensor, live: tl.tensor, HEAD_LEN: tl.constexpr):
    """One head of some tokens: values or bytes of codes [tokens, WIDTH], 0 outside."""
    # pyrefly: ignore[bad-index]
    mask = live[:, None] & (columns < HEAD_LEN)[None, :]
    return tl.load(values_ptr + places[:, None] + columns[None, :], mask=mask, other=0)


@triton.jit
def first_values(columns: tl.tensor, HEAD_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """Where in a head the value, or the first code, of each column stands; beyond the head for columns that are."""
    if PARTS > 1:
        return columns // (HEAD_LEN // PARTS) * (HEAD_DIM // PARTS) + columns % (HEAD_LEN // PARTS)
    else:
        return columns


@triton.jit
def within_ranges(
    codes: tl.tensor,
    pair_ptrs: tl.tensor,
    columns: tl.tensor,
    live: tl.tensor,
    HEAD_LEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Values [tokens, WIDTH] of codes whose head is in several parts; the codes where one range is left to the sums."""
    if PARTS > 1:
        # pyrefly: ignore[bad-index]
        mask = live[:, None] & (columns < HEAD_LEN)[None, :]
        ptrs = pair_ptrs[:, None] + 2 * (columns // (HEAD_LEN // PARTS))[None, :]
        step = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        return tl.load(ptrs + 1, mask=mask, other=0.0).to(tl.float32) + step * codes
    else:
        return codes


@triton.jit
def cap_scores(scores: tl.tensor, cap: tl.tensor):
    """Cap * tanh(score / cap), of scores and a cap in powers of two: ln 2 times both would be in powers of e."""
    faded = tl.exp2(tl.abs(scores) * (-2 * 1.4426950408889634 / cap))
    size = cap * (1 - faded) / (1 + faded)
    return tl.where(scores < 0, -size, size)


@triton.jit
def low_plane(tile: tl.tensor, PLANES: tl.constexpr):
    """Values, or the first code of each byte, in float32."""
    if PLANES == 2:
        return (tile & 15).to(tl.float32)
    else:
        return tile.to(tl.float32)


@triton.jit
def high_plane(tile: tl.tensor):
    """The second code of each byte in float32."""
    return (tile >> 4).to(tl.float32)
