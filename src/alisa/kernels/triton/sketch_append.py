"""New keys or values become low-bit codes between their own minimum and maximum, in place.

Byte i of a head holds the codes of values i, i + P, i + 2P, ... from its lowest bits up. The same arithmetic as the
torch reference, bit for bit, under the condition named in quantise.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.base import Sketch
from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.quantise import divide, inverse_of, to_codes, within_float16
from alisa.kernels.triton.settings import power_of_two, tile_rows


@triton.jit(do_not_specialize=["num_tokens"])
def sketch_keys(
    keys_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    num_tokens: tl.tensor,
    key_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One KV head of some tokens. Grid (blocks of tokens, G)."""
    NUM_STEPS: tl.constexpr = 2.0**BITS - 1.0
    head = tl.program_id(1)
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < num_tokens
    columns = tl.arange(0, WIDTH)
    inside = live[:, None] & (columns < CODE_BYTES)[None, :]
    key_ptrs = keys_ptr + (tokens * key_stride + head * head_stride)[:, None] + columns[None, :]

    low = tl.full([TOKENS], float("inf"), tl.float32)
    high = tl.full([TOKENS], float("-inf"), tl.float32)
    for plane in tl.static_range(8 // BITS):
        mask = inside & (plane * CODE_BYTES + columns < HEAD_DIM)[None, :]
        keys = tl.load(key_ptrs + plane * CODE_BYTES, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(mask, keys, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(mask, keys, float("-inf")), axis=1))
    # Adding 0 makes a zero positive.
    minimum = (within_float16(low) + 0.0).to(tl.float16)
    offset = minimum.to(tl.float32)
    step = tl.maximum(within_float16(divide(high - offset, NUM_STEPS)), 0.0).to(tl.float16)
    inverse = inverse_of(step)

    codes = tl.zeros([TOKENS, WIDTH], tl.int32)
    for plane in tl.static_range(8 // BITS):
        mask = inside & (plane * CODE_BYTES + columns < HEAD_DIM)[None, :]
        keys = tl.load(key_ptrs + plane * CODE_BYTES, mask=mask, other=0.0).to(tl.float32)
        codes |= tl.where(mask, to_codes(keys, offset, inverse, NUM_STEPS), 0) << (plane * BITS)
    places = tl.load(ids_ptr + tokens, mask=live, other=0) * NUM_KV_HEADS + head
    tl.store(codes_ptr + places[:, None] * CODE_BYTES + columns[None, :], codes.to(tl.uint8), mask=inside)
    tl.store(ranges_ptr + places * 2, step, mask=live)
    tl.store(ranges_ptr + places * 2 + 1, minimum, mask=live)


def launch_sketch_append(sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
    """The sketch holds keys or values `[N, G, D]` at rows `ids` Int64[N]."""
    # The parts of a head are heads here.
    vectors = vectors.unflatten(2, (sketch.parts, -1))
    vectors = vectors.flatten(1, 2)  # in place but for heads that do not lie in a row
    num_tokens, num_kv_heads, head_dim = vectors.shape
    code_bytes = sketch.codes.shape[2]
    tokens = min(16, tile_rows(code_bytes))
    launch(sketch_keys, (num_pieces(num_tokens, tokens), num_kv_heads))(
        vectors,
        ids,
        sketch.codes,
        sketch.ranges,
        num_tokens,
        vectors.stride(0),
        vectors.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        CODE_BYTES=code_bytes,
        BITS=sketch.bits,
        WIDTH=power_of_two(code_bytes),
        TOKENS=tokens,
    )
