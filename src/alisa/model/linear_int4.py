"""Linear layers with weights in 4 bits: every 32 inputs of an output channel have a scale and a minimum in float16.

Five bits for each weight in all, as in the Q4_1 blocks of GGUF files, whose codes can be taken over as they are. The
inputs of a token are rounded as for weights in 8 bits (`alisa.model.linear_int8`), and whole numbers are summed within
a span, exactly:

    out = sum over groups of step * (scale * sum(code * x_code) + minimum * sum(x_code)), span by span
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.kernels.base import Panels
from alisa.model.coded import CodedRows, CodedWeight, Spans
from alisa.model.linear_int8 import GROUP, quantise_inputs, rows_of
from alisa.spec import LANES, SPAN

_TOP_LEVEL = 15
_SHRINKS = (1.0, 0.9)
"""Parts of a span's range that are tried first: what is cut off at its ends makes the steps of the rest finer."""
_NUM_REFITS = 2
"""More gain less than 1 % of the squared error each, and take as long."""


def int4_panels(weight: Tensor, parts: int = 1) -> Panels:
    """A weight `[out, in]` in any float dtype, rounded; padding has scale and minimum zero."""
    return coded_panels((weight,), parts)


def coded_panels(weight: CodedWeight, parts: int = 1) -> Panels:
    """The same of a weight `[out, in]` in pieces: those in 4 bits are taken over as they are, the others rounded."""
    num_out, num_in = sum(piece.shape[0] for piece in weight), weight[0].shape[1]
    spans, rows_of_part = -(-num_in // SPAN), num_out // parts
    per_part = -(-rows_of_part // LANES)
    codes = torch.empty(parts * per_part, spans * SPAN // 8, LANES, 4, dtype=torch.uint8)
    ranges = torch.empty(parts * per_part, spans, 2, LANES, dtype=torch.float16)
    levels = torch.empty(LANES, spans, SPAN, dtype=torch.uint8)
    for panel in range(len(codes)):
        part, first = divmod(panel, per_part)
        begin = part * rows_of_part + first * LANES
        end = min(begin + LANES, (part + 1) * rows_of_part)
        if end - begin < LANES:
            levels.zero_()
            ranges[panel] = 0
        lane = 0
        for found in _rows(weight, begin, end):
            last = lane + len(found.levels)
            levels[lane:last] = found.levels
            ranges[panel, :, 0, lane:last], ranges[panel, :, 1, lane:last] = found.scales.T, found.minima.T
            lane = last
        _fill_panel(codes[panel], levels)
    return Panels("int4", codes, None, ranges, num_in, num_out, parts)


def _rows(weight: CodedWeight, begin: int, end: int) -> Iterator[Spans]:
    """The spans of rows `[begin, end)` of the pieces, one after the other."""
    start = 0
    for piece in weight:
        first, last = max(begin - start, 0), min(end - start, piece.shape[0])
        start += piece.shape[0]
        if first < last:
            yield piece.spans(first, last) if isinstance(piece, CodedRows) else quantise_spans(piece[first:last])


def _fill_panel(codes: Tensor, levels: Tensor) -> None:
    """Codes UInt8[octs, 64, 4] of levels UInt8[64, spans, 32]: byte i of an oct holds inputs i (low) and i + 4."""
    octs = levels.view(LANES, -1, 2, 4)
    bytes_of_octs = (octs[:, :, 0] | (octs[:, :, 1] << 4)).view(torch.int32).view(LANES, -1)
    codes.view(torch.int32).view(-1, LANES).copy_(bytes_of_octs.t())


def quantise_spans(rows: Tensor) -> Spans:
    """Rows `[N, in]` in any float dtype, rounded; the last span is filled up with zeros.

    To the nearest levels of a range, and then to the range with the least squared error for these levels, in turns. It
    begins with the better of two: all of a span's range, and a part of it that makes the steps finer. The idea is that
    of `make_qkx2_quants` in ggml (https://github.com/ggml-org/ggml, `ggml-quants.c`), which tries more ranges.
    """
    num_rows, num_in = rows.shape
    values = torch.zeros(num_rows, -(-num_in // SPAN) * SPAN)
    values[:, :num_in] = rows
    values = values.view(num_rows, -1, SPAN)
    low, high = values.amin(dim=2), values.amax(dim=2)
    middle, reach = (low + high) / 2, (high - low) / 2
    values -= middle.unsqueeze(2)  # so that little is lost in the differences of sums
    whole, part = (
        _fitted(values, _levels(values, 2 * shrink * reach / _TOP_LEVEL, -shrink * reach)) for shrink in _SHRINKS
    )
    better = part.explained > whole.explained
    scale = torch.where(better, part.scale, whole.scale)
    minimum = torch.where(better, part.minimum, whole.minimum)
    for _ in range(_NUM_REFITS):
        scale, minimum, _ = _fitted(values, _levels(values, scale, minimum))
    scales, minima = scale.to(torch.float16), (minimum + middle).to(torch.float16)
    levels = _levels(values, scales.to(torch.float32), minima.to(torch.float32) - middle)
    return Spans(levels.to(torch.uint8), scales, minima)


def _levels(values: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest levels of values `[..., SPAN]` in ranges `[...]`, whole numbers in float32."""
    step = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return ((values - minimum.unsqueeze(-1)) / step).round_().clamp_(0, _TOP_LEVEL)


class _Fit(NamedTuple):
    """Of each span, the range with the least squared error, and how much of the squares about the mean it explains."""

    scale: Tensor
    minimum: Tensor
    explained: Tensor


def _fitted(values: Tensor, levels: Tensor) -> _Fit:
    """The line through levels and values `[..., SPAN]`: a regression for each span, `[...]`."""
    total, sum_levels = values.sum(dim=-1), levels.sum(dim=-1)
    spread = SPAN * levels.square().sum(dim=-1) - sum_levels.square()
    together = SPAN * (levels * values).sum(dim=-1) - sum_levels * total
    scale = torch.where(spread > 0, together / spread, 0.0)
    return _Fit(scale, (total - scale * sum_levels) / SPAN, scale * together)


def unpacked(panels: Panels) -> Tensor:
    """Levels UInt8[out, spans * 32]."""
    halves = torch.stack((panels.codes & 15, panels.codes >> 4), dim=3)  # [panels, octs, 64, 2, 4]
    return rows_of(panels, halves.flatten(3))


def multiply_int4(x: Tensor, panels: Panels, bias: Tensor | None) -> Tensor:
    """Product of x `[M, in]` with a weight in 4 bits, plus the bias Float32[out]: Float32[M, out], in plain torch."""
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
    return total if bias is None else total + bias
