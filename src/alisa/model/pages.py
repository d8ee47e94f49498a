"""Short-lived tensors whose memory goes back to the system at once.

Loading alternates between tensors that are read and dropped and packed weights that stay. From malloc, the dropped ones
leave holes between the others: 60 MB of 220 in the memory test. Pages of their own leave none.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def page_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in anonymous pages, unmapped when the last view of it goes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype).view(shape)
