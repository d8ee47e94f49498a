"""Linear layers with weights in 4 bits: every 32 inputs of an output channel have a scale and a minimum in float16.

Five bits for each weight in all, as in the Q4_1 blocks of GGUF files, whose codes can be taken over as they are. The
inputs of a token are rounded as for weights in 8 bits (`alisa.model.linear_int8`), and whole numbers are summed within
a span, exactly:

    out = sum over groups of step * (scale * sum(code * x_code) + minimum * sum(x_code)), span by span
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Panels
from alisa.model.linear_int8 import GROUP, quantise_inputs, rows_of
from alisa.spec import LANES, SPAN

_LEVELS = 15
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a span's range that are tried: what is cut off at its ends makes the steps of the rest finer."""


def int4_panels(weight: Tensor, parts: int = 1) -> Panels:
    """A weight `[out, in]` in any float dtype, rounded; padding has scale and minimum zero.

    Each span gets the range, out of a few, with the least squared error.
    """
    num_out, num_in = weight.shape
    spans, rows_of_part = -(-num_in // SPAN), num_out // parts
    per_part = -(-rows_of_part // LANES)
    codes = torch.empty(parts * per_part, spans * SPAN // 8, LANES, 4, dtype=torch.uint8)
    ranges = torch.empty(parts * per_part, spans, 2, LANES, dtype=torch.float16)
    for panel in range(len(codes)):
        part, first = divmod(panel, per_part)
        begin = part * rows_of_part + first * LANES
        rows = weight[begin : min(begin + LANES, (part + 1) * rows_of_part)].to(torch.float32)
        whole = torch.zeros(LANES, spans * SPAN)
        whole[: len(rows), :num_in] = rows
        levels, scales, minima = _quantise_spans(whole.view(LANES, spans, SPAN))
        fill_panel(codes[panel], ranges[panel], levels, scales, minima)
    return Panels("int4", codes, None, ranges, num_in, num_out, parts)


def fill_panel(codes: Tensor, ranges: Tensor, levels: Tensor, scales: Tensor, minima: Tensor) -> None:
    """One panel from levels UInt8[64, spans, 32], scales and minima `[64, spans]`.

    Codes UInt8[octs, 64, 4]: byte i of an oct holds inputs i (low) and i + 4 (high).
    """
    octs = levels.reshape(LANES, -1, 2, 4)
    bytes_of_octs = (octs[:, :, 0] | (octs[:, :, 1] << 4)).view(torch.int32).view(LANES, -1)
    codes.view(torch.int32).view(-1, LANES).copy_(bytes_of_octs.t())
    ranges[:, 0], ranges[:, 1] = scales.T, minima.T


def _quantise_spans(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels UInt8[64, spans, 32], scales and minima Float16[64, spans] of values Float32[64, spans, 32]."""
    low, high = values.amin(dim=2), values.amax(dim=2)
    middle, reach = (low + high) / 2, (high - low) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.empty(0)
    for shrink in _SHRINKS:
        scales = (2 * shrink * reach / _LEVELS).to(torch.float16)
        minima = (middle - shrink * reach).to(torch.float16)
        step = scales.float().unsqueeze(2)
        base = minima.float().unsqueeze(2)
        levels = ((values - base) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, _LEVELS)
        error = (levels * step + base - values).square_().sum(dim=2)
        if best is None:
            best, least = (levels, scales, minima), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better.unsqueeze(2), levels, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better, minima, best[2]),
        )
    assert best is not None, "there are shrinks"
    return best[0].to(torch.uint8), best[1], best[2]


def unpacked(panels: Panels) -> Tensor:
    """Levels UInt8[out, spans * 32]."""
    halves = torch.stack((panels.codes & 15, panels.codes >> 4), dim=3)  # [panels, octs, 64, 2, 4]
    return rows_of(panels, halves.flatten(3))


def multiply_int4(x: Tensor, panels: Panels, bias: Tensor | None) -> Tensor:
    """Product of x `[M, in]` with a weight in 4 bits, plus the bias Float32[out]: `[M, out]` as x, in plain torch."""
    assert panels.ranges is not None, "4 bits have ranges"
    x_codes, steps = quantise_inputs(x)
    x_spans = x_codes.view(len(x), -1, SPAN)
    levels = unpacked(panels).float().view(panels.num_out, -1, SPAN)
    scales, minima = (rows_of(panels, panels.ranges[:, :, which].unsqueeze(3)).float() for which in range(2))
    total = torch.zeros(len(x), panels.num_out)
    for span in range(levels.shape[1]):
        codes = x_spans[:, span]
        part = scales[:, span] * (codes @ levels[:, span].T) + minima[:, span] * codes.sum(dim=1, keepdim=True)
        total += steps[:, span * SPAN // GROUP, None] * part
    return (total if bias is None else total + bias).to(x.dtype)
