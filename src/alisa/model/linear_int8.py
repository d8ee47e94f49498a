"""Linear layers with weights in 8 bits: half the memory of 16-bit ones, and half the bytes that a decode step reads.

Every output channel has a scale, and its codes stand for `scale * (code - 128)`. The inputs of a token are rounded to
signed 8 bits when they come, each run of `GROUP` inputs in steps of its own: models have inputs a hundred times as
large as the others (LLM.int8, arXiv:2208.07339), and one step for all of a token would round the others to nothing.
Whole numbers are summed within a group, exactly; a token's result depends on nothing but the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Panels
from alisa.spec import LANES, QUAD

GROUP = 64
"""Inputs of a token that share a step; as `kGroup` in kernels/native/csrc/model/matrix.h."""
_ZERO = 128
_SMALLEST = 1e-30
"""A group whose largest input is below this is all zeros: its steps would not be normal numbers."""


def int8_panels(weight: Tensor, parts: int = 1) -> Panels:
    """A weight `[out, in]` in any float dtype, rounded; padding is 128 (zero)."""
    num_out, num_in = weight.shape
    num_quads, rows_of_part = -(-num_in // QUAD), num_out // parts
    per_part = -(-rows_of_part // LANES)
    codes = torch.empty(parts * per_part, num_quads, LANES, QUAD, dtype=torch.uint8)
    scales = torch.empty(num_out)
    for panel in range(len(codes)):
        part, first = divmod(panel, per_part)
        begin = part * rows_of_part + first * LANES
        rows = weight[begin : min(begin + LANES, (part + 1) * rows_of_part)].to(torch.float32)
        count = len(rows)
        scale = rows.abs().amax(dim=1) / 127
        scales[begin : begin + count] = scale
        steps = (rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_().clamp_(-127, 127).add_(_ZERO)
        whole = torch.full((LANES, num_quads * QUAD), _ZERO, dtype=torch.uint8)
        whole[:count, :num_in] = steps
        # Quads as whole numbers: a transposed matrix of them is copied faster.
        codes[panel].view(torch.int32).view(num_quads, LANES).copy_(whole.view(torch.int32).view(LANES, num_quads).t())
    return Panels("int8", codes, scales, None, num_in, num_out, parts)


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


def multiply_int8(x: Tensor, panels: Panels, bias: Tensor | None) -> Tensor:
    """Product of x `[M, in]` with a weight in 8 bits, plus the bias Float32[out]: Float32[M, out], in plain torch.

    The sum of a group is a whole number below 2^24: float32 holds it exactly, in whatever order it is added up.
    """
    assert panels.scales is not None, "8 bits have scales"
    x_codes, steps = quantise_inputs(x)
    total = torch.zeros(len(x), panels.num_out)
    for group in range(steps.shape[1]):
        quads = panels.codes[:, group * GROUP // QUAD : (group + 1) * GROUP // QUAD]
        weight = rows_of(panels, quads).to(torch.float32) - _ZERO
        total += steps[:, group, None] * (x_codes[:, group, : weight.shape[1]] @ weight.T)
    total *= panels.scales
    return total if bias is None else total + bias


def rows_of(panels: Panels, values: Tensor) -> Tensor:
    """Values `[panels, steps, 64, n]` as rows `[out, steps * n]`, without the padding of the parts."""
    rows = values.transpose(1, 2).reshape(panels.parts, -1, values.shape[1] * values.shape[3])
    return rows[:, : panels.num_out // panels.parts].reshape(panels.num_out, -1)
