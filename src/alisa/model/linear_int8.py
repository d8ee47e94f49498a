"""Linear layers with weights in 8 bits: half the memory of 16-bit ones, and half the bytes that a decode step reads.

Every output channel has a scale, and its codes stand for `scale * (code - 128)`. The inputs of a token are rounded to
signed 8 bits when they come, each run of `GROUP` inputs in steps of its own: models have inputs a hundred times as
large as the others (LLM.int8, arXiv:2208.07339), and one step for all of a token would round the others to nothing.
Whole numbers are summed within a group, exactly; a token's result depends on nothing but the token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alisa.spec import LANES, QUAD

GROUP = 64
"""Inputs of a token that share a step; as `kGroup` in kernels/native/product.h."""
_ZERO = 128
_SMALLEST = 1e-30
"""A group whose largest input is below this is all zeros: its steps would not be normal numbers."""
_ROWS_AT_ONCE = LANES
"""Output channels that are quantised together: what is held of them in float32 is small, and leaves small holes."""

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""x `[M, in]`, codes UInt8[panels, quads, 64, 4], scales Float32[out], bias Float32[out] or None -> `[M, out]` as x.

`multiply_int8` is the meaning; the kernels give the same to the last bit.
"""


class QuantisedLinear:
    """A weight `[out, in]` rounded to 8 bits once, as panels of 64 output channels in the order in which they are read.

    Args:
        weight: `[out, in]` in any float dtype; may be dropped by the caller after.
        bias: `[out]`, or None.
        multiply: does the arithmetic.
    """

    __slots__ = ("_bias", "_codes", "_multiply", "_scales")

    def __init__(self, weight: Tensor, bias: Tensor | None, multiply: Multiply) -> None:
        self._codes, self._scales = quantise_weight(weight)
        self._bias = None if bias is None else bias.to(torch.float32)
        self._multiply = multiply

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and bias."""
        return self._codes.nbytes + self._scales.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Product of `x [..., in]` with the weight, plus the bias: `[..., out]`."""
        out = self._multiply(x.reshape(-1, x.shape[-1]), self._codes, self._scales, self._bias)
        return out.view(*x.shape[:-1], out.shape[1])


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes UInt8[panels, quads, 64, 4], padded with 128 (zero), and scales Float32[out] of a weight `[out, in]`."""
    num_out, num_in = weight.shape
    num_quads = -(-num_in // QUAD)
    codes = torch.empty(-(-num_out // LANES), num_quads, LANES, QUAD, dtype=torch.uint8)
    scales = torch.empty(num_out)
    for first in range(0, num_out, _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].to(torch.float32)
        count = len(rows)
        scale = rows.abs().amax(dim=1) / 127
        scales[first : first + count] = scale
        steps = (rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_().clamp_(-127, 127).add_(_ZERO)
        panels = -(-count // LANES)
        whole = torch.full((panels * LANES, num_quads * QUAD), _ZERO, dtype=torch.uint8)
        whole[:count, :num_in] = steps
        place = codes[first // LANES : first // LANES + panels]
        place.copy_(whole.view(panels, LANES, num_quads, QUAD).transpose(1, 2))
    return codes, scales


def quantise_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes Float32[M, groups, GROUP], whole numbers from -127 to 127, and steps Float32[M, groups] of `x [M, in]`."""
    num_tokens, num_in = x.shape
    num_groups = -(-num_in // GROUP)
    values = torch.zeros(num_tokens, num_groups * GROUP)
    values[:, :num_in] = x
    values = values.view(num_tokens, num_groups, GROUP)
    largest = values.abs().amax(dim=2)  # NaN where there is one, so that the outputs show it
    zero = largest < _SMALLEST
    # Of two tensors: a number over a tensor is a product with its reciprocal, which rounds twice.
    inverse = torch.where(zero, 0.0, torch.full_like(largest, 127.0) / largest)
    return (values * inverse.unsqueeze(2)).round(), torch.where(zero, 0.0, largest / 127.0)


def multiply_int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The product as `Multiply` says, in plain torch.

    The sum of a group is a whole number below 2^24: float32 holds it exactly, in whatever order it is added up.
    """
    num_out = len(scales)
    x_codes, steps = quantise_inputs(x)
    total = torch.zeros(len(x), num_out)
    for group in range(steps.shape[1]):
        quads = codes[:, group * GROUP // QUAD : (group + 1) * GROUP // QUAD]
        weight = quads.transpose(1, 2).reshape(codes.shape[0] * LANES, -1)[:num_out].to(torch.float32) - _ZERO
        total += steps[:, group, None] * (x_codes[:, group, : weight.shape[1]] @ weight.T)
    total *= scales
    return (total if bias is None else total + bias).to(x.dtype)
