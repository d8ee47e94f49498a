"""The number formats of GGUF tensors, and how the bytes of their blocks become float32.

A row is cut into blocks of 32 or 256 values; each holds small whole numbers and the scales that they are multiplied
with. The layouts are those of ggml (https://github.com/ggml-org/ggml, `ggml-common.h`): in the formats with 32 values
the low halves of the bytes are the first 16 values and the high halves the last 16; in the others 32 bytes hold 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.model.coded import Spans
from alisa.model.mxfp4 import decode_mxfp4


@dataclass(frozen=True, slots=True)
class BlockType:
    """One number format."""

    name: str
    num_values: int
    """Values of a block."""
    num_bytes: int
    """Bytes of a block."""
    decode: Callable[[Tensor], Tensor]
    """Blocks UInt8[N, num_bytes] -> Float32[N, num_values]."""
    spans: Callable[[Tensor], Spans] | None = None
    """Blocks UInt8[N, num_bytes] -> the spans of each, `[N, num_values / 32]`; None: not levels of 4 bits in ranges."""


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, Float32[N, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(torch.float32)


def _halves(codes: Tensor) -> Tensor:
    """Low halves of the bytes `[..., n]`, then the high ones: `[..., 2 n]`."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def _bits(codes: Tensor, start: int) -> Tensor:
    """Bit i of the four bytes at `start`, for i from 0 to 31: UInt8[N, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((codes[:, start : start + 4, None] >> shifts) & 1).flatten(1)


def _decode_q4_0(blocks: Tensor) -> Tensor:
    return (_halves(blocks[:, 2:]).to(torch.float32) - 8) * _half(blocks, 0)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 4:]).to(torch.float32) * _half(blocks, 0) + _half(blocks, 2)


def _spans_q4_0(blocks: Tensor) -> Spans:
    """Levels less 8, times the scale: a range whose minimum, eight scales, is exact in float16."""
    scales = blocks[:, :2].contiguous().view(torch.float16)
    return Spans(_halves(blocks[:, 2:]).unsqueeze(1), scales, -8 * scales)


def _spans_q4_1(blocks: Tensor) -> Spans:
    scales, minima = blocks[:, :4].contiguous().view(torch.float16).split(1, dim=1)
    return Spans(_halves(blocks[:, 4:]).unsqueeze(1), scales, minima)


def _decode_q5_0(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[:, 6:]) | (_bits(blocks, 2) << 4)
    return (codes.to(torch.float32) - 16) * _half(blocks, 0)


def _decode_q5_1(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[:, 8:]) | (_bits(blocks, 4) << 4)
    return codes.to(torch.float32) * _half(blocks, 0) + _half(blocks, 2)


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32) * _half(blocks, 0)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of 6 bits out of 12 bytes UInt8[N, 12]; UInt8[N, 8] each.

    The first four of each are the low 6 bits of a byte. The others have their low 4 bits in the last four bytes, and
    their high 2 bits on top of the first ones.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales, minimums


def _ranges(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of eight groups and what is taken off them, Float32[N, 8]; exact: products of 11 and 6 bits."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    return _half(blocks, 0) * scales.to(torch.float32), _half(blocks, 2) * minimums.to(torch.float32)


def _scaled_groups(blocks: Tensor, codes: Tensor) -> Tensor:
    """Codes UInt8[N, 8, 32] times the scales of their groups, less the minimums: Float32[N, 256]."""
    scale, minimum = _ranges(blocks)
    return (codes.to(torch.float32) * scale.unsqueeze(2) - minimum.unsqueeze(2)).flatten(1)


def _codes_q4_k(blocks: Tensor) -> Tensor:
    """UInt8[N, 8, 32]: eight groups of 32 levels."""
    return _halves(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    return _scaled_groups(blocks, _codes_q4_k(blocks))


def _spans_q4_k(blocks: Tensor) -> Spans:
    """The levels as they are; the ranges, of 17 bits, are rounded to float16."""
    scale, minimum = _ranges(blocks)
    return Spans(_codes_q4_k(blocks), scale.to(torch.float16), (-minimum).to(torch.float16))


def _decode_q5_k(blocks: Tensor) -> Tensor:
    codes = _halves(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).unsqueeze(1)) & 1
    return _scaled_groups(blocks, codes | (high << 4))


def _decode_q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].view(-1, 2, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).view(-1, 16, 16).to(torch.float32) - 32
    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32) * _half(blocks, 208)
    return (codes * scales.unsqueeze(2)).flatten(1)


def _decode_mxfp4(blocks: Tensor) -> Tensor:
    return decode_mxfp4(_halves(blocks[:, 1:]), blocks[:, :1])


def _plain(name: str, dtype: torch.dtype) -> BlockType:
    return BlockType(name, 1, dtype.itemsize, lambda blocks: blocks.contiguous().view(dtype).to(torch.float32))


BLOCK_TYPES: dict[int, BlockType] = {
    0: _plain("F32", torch.float32),
    1: _plain("F16", torch.float16),
    2: BlockType("Q4_0", 32, 18, _decode_q4_0, _spans_q4_0),
    3: BlockType("Q4_1", 32, 20, _decode_q4_1, _spans_q4_1),
    6: BlockType("Q5_0", 32, 22, _decode_q5_0),
    7: BlockType("Q5_1", 32, 24, _decode_q5_1),
    8: BlockType("Q8_0", 32, 34, _decode_q8_0),
    12: BlockType("Q4_K", 256, 144, _decode_q4_k, _spans_q4_k),
    13: BlockType("Q5_K", 256, 176, _decode_q5_k),
    14: BlockType("Q6_K", 256, 210, _decode_q6_k),
    30: _plain("BF16", torch.bfloat16),
    39: BlockType("MXFP4", 32, 17, _decode_mxfp4),
}
"""By the number that the file has for them; all that can be read."""

OTHER_TYPES: dict[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}
"""Names of the formats that are not read, to refuse them by."""
