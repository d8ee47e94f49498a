"""New tokens become rows where they will stay: the bytes of `alisa.cache.codec`.

A program takes one KV head of up to 16 tokens, or one part of it where parts have ranges of their own: a decode step
has few tokens and many heads, a prompt many of both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.quantise import divide, float16_above, float16_below, inverse_of, to_codes, within_float16
from alisa.kernels.triton.rows import RowView
from alisa.kernels.triton.settings import power_of_two, tile_rows
from alisa.spec import RowFormat


@triton.jit
def write_values(
    source_ptrs: tl.tensor,
    value_ptrs: tl.tensor,
    columns: tl.tensor,
    live: tl.tensor,
    HEAD_LEN: tl.constexpr,
):
    """One head of K or of V of some tokens as floats; the pointers are those of each token's head."""
    # pyrefly: ignore[bad-index]
    mask = live[:, None] & (columns < HEAD_LEN)[None, :]
    values = tl.load(source_ptrs[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    # pyrefly: ignore[missing-attribute]
    tl.store(value_ptrs[:, None] + columns[None, :], values.to(value_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def write_codes(
    source_ptrs: tl.tensor,
    code_ptrs: tl.tensor,
    pair_ptrs: tl.tensor,
    columns: tl.tensor,
    live: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEAD_LEN: tl.constexpr,
    PLANES: tl.constexpr,
):
    """One head of K or of V of some tokens as codes, with its scale and minimum."""
    NUM_STEPS: tl.constexpr = 2.0 ** (8 // PLANES) - 1.0
    # pyrefly: ignore[bad-index]
    low_mask = live[:, None] & (columns < HEAD_LEN)[None, :]
    low = tl.load(source_ptrs[:, None] + columns[None, :], mask=low_mask, other=0.0).to(tl.float32)
    smallest = tl.min(tl.where(low_mask, low, float("inf")), axis=1)
    largest = tl.max(tl.where(low_mask, low, float("-inf")), axis=1)
    if PLANES == 2:
        high_mask = live[:, None] & (HEAD_LEN + columns < HEAD_DIM)[None, :]
        high = tl.load(source_ptrs[:, None] + HEAD_LEN + columns[None, :], mask=high_mask, other=0.0).to(tl.float32)
        smallest = tl.minimum(smallest, tl.min(tl.where(high_mask, high, float("inf")), axis=1))
        largest = tl.maximum(largest, tl.max(tl.where(high_mask, high, float("-inf")), axis=1))
    # Adding 0 makes a zero positive.
    minimum = float16_below(within_float16(smallest) + 0.0)
    offset = minimum.to(tl.float32)
    scale = float16_above(tl.maximum(within_float16(divide(largest - offset, NUM_STEPS)), 0.0) + 0.0)
    tl.store(pair_ptrs, scale, mask=live)
    tl.store(pair_ptrs + 1, minimum, mask=live)
    inverse = inverse_of(scale)
    codes = to_codes(low, offset, inverse, NUM_STEPS)
    if PLANES == 2:
        # pyrefly: ignore[unbound-name]
        codes |= tl.where(high_mask, to_codes(high, offset, inverse, NUM_STEPS), 0) << 4
    tl.store(code_ptrs[:, None] + columns[None, :], codes.to(tl.uint8), mask=low_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def encode_rows(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    values_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_tokens: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    value_stride: tl.tensor,
    pair_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    K_LEN: tl.constexpr,
    V_LEN: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_PLANES: tl.constexpr,
    PAIRS_AT: tl.constexpr,
    CODED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """K and V of one KV head of some tokens. Grid (blocks of tokens, G)."""
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < num_tokens
    slots = tl.load(slots_ptr + tokens, mask=live, other=0)
    k_columns, v_columns = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    values_ptrs = values_ptr + slots * value_stride
    pairs_ptrs = pairs_ptr + slots * pair_stride
    k_ptrs = k_ptr + tokens * k_stride + head * k_head_stride
    v_ptrs = v_ptr + tokens * v_stride + head * v_head_stride
    k_places = values_ptrs + head * K_LEN
    v_places = values_ptrs + num_heads * K_LEN + head * V_LEN
    if CODED:
        k_pairs = pairs_ptrs + PAIRS_AT + 2 * head
        v_pairs = k_pairs + 2 * num_heads
        write_codes(k_ptrs, k_places, k_pairs, k_columns, live, HEAD_DIM, K_LEN, K_PLANES)
        write_codes(v_ptrs, v_places, v_pairs, v_columns, live, HEAD_DIM, V_LEN, V_PLANES)
        if K_PLANES != V_PLANES:
            # The byte that fills up an odd number of them.
            end = num_heads * (K_LEN + V_LEN)
            tl.store(values_ptrs + end, 0, mask=live & (head == 0) & (end < 2 * PAIRS_AT))
    else:
        write_values(k_ptrs, k_places, k_columns, live, K_LEN)
        write_values(v_ptrs, v_places, v_columns, live, V_LEN)


def launch_append(rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """K and V `[N, G, D]`, each head in one run, stand as rows at `slots` Int64[N]."""
    view = RowView.of(rows, row_format)
    num_parts, part_dim = row_format.part_shape
    if view.parts > 1:
        k, v = (values.reshape(len(values), num_parts, part_dim) for values in (k, v))
    k_len, v_len = view.k_len // view.parts, view.v_len // view.parts
    tokens = min(16, tile_rows(part_dim))
    launch(encode_rows, (num_pieces(len(slots), tokens), num_parts))(
        k,
        v,
        view.values,
        view.pairs,
        slots,
        len(slots),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        view.values.stride(0),
        view.pairs.stride(0),
        HEAD_DIM=part_dim,
        K_LEN=k_len,
        V_LEN=v_len,
        K_PLANES=view.k_planes,
        V_PLANES=view.v_planes,
        PAIRS_AT=view.pairs_at,
        CODED=view.coded,
        K_WIDTH=power_of_two(k_len),
        V_WIDTH=power_of_two(v_len),
        TOKENS=tokens,
    )
