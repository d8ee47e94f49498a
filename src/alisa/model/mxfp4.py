"""Numbers in MXFP4: floats of 4 bits (E2M1), every 32 of them with a power of two in a byte (E8M0).

OCP Microscaling Formats 1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf. All
of them are numbers of bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_VALUES = 32
"""Of a block."""
_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice what the codes stand for."""


def decode_mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """Float32[N, 32] of codes UInt8[N, 32], 0 to 15, and exponents UInt8[N, 1]."""
    wide = exponents.to(torch.int32)
    # 2^(exponent - 128), the half of what the byte says, by its bits; the two least are no normal numbers.
    bits = torch.where(wide < 2, 0x200000 << wide, (wide - 1) << 23)
    return torch.tensor(_STEPS, dtype=torch.float32)[codes.to(torch.int32)] * bits.view(torch.float32)
