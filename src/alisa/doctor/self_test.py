"""One small sparse decode step through the native kernels and through plain torch: do they really run, and agree?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alisa.cache.codec import make_codec
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.reference.decode import decode_attention
from alisa.spec import RowFormat

ROW_DTYPES = ("float32", "bfloat16", "int8", "int4", "k8v4")
_NUM_ROWS, _NUM_SEQS, _NUM_SLOTS, _HEAD_DIM = 100, 2, 33, 64

TOLERANCE = 8 * (_HEAD_DIM + _NUM_SLOTS) * torch.finfo(torch.float32).eps
"""Float32 sums of D + K terms of size one, in any order, with room for the few values that are larger."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What came out of the step."""

    largest_difference: float | None
    """Between what the kernels returned and what plain torch did, over all kinds of rows; None: they never finished."""
    failure: str = ""
    """Why they did not finish."""

    @property
    def passed(self) -> bool:
        """Whether the kernels did what plain torch does."""
        return self.largest_difference is not None and self.largest_difference <= TOLERANCE


def run_self_test(kernels: CpuKernels) -> SelfTest:
    """Append and attend with `kernels` and with their torch references on the same values."""
    try:
        return SelfTest(max(_largest_difference(kernels, dtype) for dtype in ROW_DTYPES))
    except Exception as error:  # a library of another version fails in ways that nobody can list
        return SelfTest(None, f"{type(error).__name__}: {error}")


def _largest_difference(kernels: CpuKernels, row_dtype: str) -> float:
    generator = torch.Generator().manual_seed(0)
    codec = make_codec(RowFormat(row_dtype, num_kv_heads=2, head_dim=_HEAD_DIM))
    k, v = (torch.randn(_NUM_ROWS, 2, _HEAD_DIM, generator=generator) for _ in range(2))
    q = torch.randn(_NUM_SEQS, 4, _HEAD_DIM, generator=generator)
    chosen = [torch.randperm(_NUM_ROWS, generator=generator)[:_NUM_SLOTS] for _ in range(_NUM_SEQS)]
    slots = torch.stack(chosen).int().unsqueeze(1)
    counts = torch.tensor([_NUM_SLOTS, _NUM_SLOTS // 2], dtype=torch.int32)
    rows = torch.empty(_NUM_ROWS, codec.format.row_bytes, dtype=torch.uint8)
    kernels.append(rows, codec.format, torch.arange(_NUM_ROWS), k, v)
    ours = kernels(q, rows, codec, slots, counts)
    reference = decode_attention(q, codec.encode(k, v), codec, slots, counts)
    # nan, which compares as false with everything, must not pass for agreement; JSON knows no infinity.
    largest = torch.finfo(torch.float32).max
    differences = [(a - b).abs().nan_to_num(largest, largest).max() for a, b in zip(ours, reference, strict=True)]
    return float(max(differences))
