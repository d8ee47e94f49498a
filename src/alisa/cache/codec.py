"""Row codecs: K and V of one token as one contiguous run of bytes.

Movers and tiers see bytes only; kernels read the same bytes by `RowFormat`. A float codec is a plain copy with a cast;
an integer codec keeps 8 or 4 bits of each value and a scale and minimum for each part of a head of K and of V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.kernels.base import Codec
from alisa.spec import CODE_BITS, RowFormat

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class FloatCodec:
    """Rows `[2, G, D]` in a float dtype, K first; lossless when the dtype is the one the model computes in."""

    format: RowFormat

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """K and V `[N, G, D]` as rows `UInt8[N, row_bytes]`."""
        rows = torch.stack((k, v), dim=1).to(TORCH_DTYPES[self.format.dtype])
        return rows.flatten(1).view(torch.uint8)

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `UInt8[N, row_bytes]` as k, v `[N, G, D]` in the row's dtype; views, no copy."""
        shape = (len(rows), 2, self.format.num_kv_heads, self.format.head_dim)
        pairs = rows.view(TORCH_DTYPES[self.format.dtype]).view(shape)
        return pairs[:, 0], pairs[:, 1]


FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class IntCodec:
    """Rows of 8-bit or 4-bit codes: value = minimum + scale * code, for each token and part of a head of K and of V.

    The minimum is rounded down to float16 and the scale that reaches the maximum is rounded up, so nothing is clipped
    and a value moves by at most half a step. Minima saturate at -65504.
    """

    format: RowFormat

    def encode(self, k: Tensor, v: Tensor) -> Tensor:
        """K and V `[N, G, D]` as rows `UInt8[N, row_bytes]`."""
        halves = [self._codes(values.float(), bits) for values, bits in zip((k, v), self._bits, strict=True)]
        codes = torch.cat([codes for codes, _ in halves], dim=1)
        codes = torch.nn.functional.pad(codes, (0, self.format.pairs_at - codes.shape[1]))
        return torch.cat((codes, *(pairs for _, pairs in halves)), dim=1)

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `UInt8[N, row_bytes]` as k, v `Float32[N, G, D]`."""
        (num_parts, _), pairs_at = self.format.part_shape, self.format.pairs_at
        k_bytes, v_bytes = (self.format.num_kv_heads * head_bytes for head_bytes in self.format.head_bytes)
        k_bits, v_bits = self._bits
        pairs = rows[:, pairs_at:].contiguous().view(torch.float16).view(len(rows), 2, num_parts, 2).float()
        return (
            self._values(rows[:, :k_bytes], pairs[:, 0], k_bits),
            self._values(rows[:, k_bytes : k_bytes + v_bytes], pairs[:, 1], v_bits),
        )

    @property
    def _bits(self) -> tuple[int, int]:
        return CODE_BITS[self.format.dtype]

    def _codes(self, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Codes UInt8[N, G * bytes of a head] and pairs UInt8[N, G * P * 4] of K or V Float32[N, G, D]."""
        values = values.reshape(len(values), *self.format.part_shape)
        num_steps = 2**bits - 1
        minimum = _float16_below(values.amin(-1).clamp(-FLOAT16_MAX, FLOAT16_MAX) + 0.0)  # + 0: no negative zero
        reach = (values.amax(-1) - minimum.float()) / num_steps
        scale = _float16_above(reach.clamp(0, FLOAT16_MAX) + 0.0)
        inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
        codes = ((values - minimum.float()[..., None]) * inverse[..., None]).clamp(0, num_steps).round().to(torch.uint8)
        if bits == 4:
            low, high = codes.tensor_split([(codes.shape[-1] + 1) // 2], dim=-1)
            codes = low | torch.nn.functional.pad(high, (0, low.shape[-1] - high.shape[-1])) << 4
        return codes.flatten(1), torch.stack((scale, minimum), dim=-1).flatten(1).view(torch.uint8)

    def _values(self, codes: Tensor, pairs: Tensor, bits: int) -> Tensor:
        """K or V Float32[N, G, D] of codes UInt8[N, G * bytes of a head] and pairs Float32[N, G * P, 2]."""
        num_parts, part_len = self.format.part_shape
        codes = codes.unflatten(1, (num_parts, -1))
        if bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)[..., :part_len]
        values = pairs[..., 1:] + pairs[..., :1] * codes.float()
        return values.view(len(values), self.format.num_kv_heads, self.format.head_dim)


def make_codec(row_format: RowFormat) -> Codec:
    """The codec that writes rows of this format."""
    return IntCodec(row_format) if row_format.dtype in CODE_BITS else FloatCodec(row_format)


def _float16_below(values: Tensor) -> Tensor:
    """The largest float16 that is not above each value."""
    half = values.half()
    bits = half.view(torch.int16)
    below = torch.where(bits < 0, bits + 1, torch.where(bits == 0, torch.full_like(bits, -32767), bits - 1))
    return torch.where(half.float() > values, below, bits).view(torch.float16)


def _float16_above(values: Tensor) -> Tensor:
    """The smallest float16 that is not below each value; values are not negative."""
    half = values.half()
    bits = half.view(torch.int16)
    return torch.where(half.float() < values, bits + 1, bits).view(torch.float16)
