"""The arithmetic of integer rows and sketches, operation by operation that of their torch references.

Divisions are the correctly rounded ones (Triton's `/` may be off by two units in the last place), halves go to the even
integer, and no product is followed by a sum that a compiler may fuse. So codes, scales and minima have the reference's
bits on every device; for differences below 1.2e-38 (subnormal in float32) that depends on the GPU not flushing them to
0.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def within_float16(x: tl.tensor):
    """X, or the nearest finite value that float16 has."""
    return tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX)


@triton.jit
def float16_below(x: tl.tensor):
    """The largest float16 that is not above x, for x in the range of float16."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    below = tl.where(bits < 0, bits + 1, tl.where(bits == 0, -32767, bits - 1)).to(tl.int16)
    return tl.where(half.to(tl.float32) > x, below, bits).to(tl.float16, bitcast=True)


@triton.jit
def float16_above(x: tl.tensor):
    """The smallest float16 that is not below x, for x in [0, 65504]."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    return tl.where(half.to(tl.float32) < x, bits + 1, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def divide(x: tl.tensor, NUM: tl.constexpr):
    """X / NUM, correctly rounded."""
    return tl.div_rn(x, tl.full(x.shape, NUM, tl.float32))


@triton.jit
def inverse_of(scale: tl.tensor):
    """1 / scale in float32, correctly rounded; 0 for a scale of 0."""
    wide = scale.to(tl.float32)
    used = tl.where(wide > 0.0, wide, 1.0)
    return tl.where(wide > 0.0, tl.div_rn(tl.full(used.shape, 1.0, tl.float32), used), 0.0)


@triton.jit
def to_codes(values: tl.tensor, minimum: tl.tensor, inverse: tl.tensor, NUM_STEPS: tl.constexpr):
    """Steps above the minimum of each row of values, Int32."""
    steps = (values - minimum[:, None]) * inverse[:, None]
    steps = tl.minimum(tl.maximum(steps, 0.0), NUM_STEPS)
    # What is added leaves no bits after the point: the sum is rounded to an integer, halves to the even one.
    return ((steps + 12582912.0) - 12582912.0).to(tl.int32)
