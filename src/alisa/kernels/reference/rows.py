"""Rows between a file and memory, without a compiler."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np

from alisa.kernels.base import Bytes, Slots

_MOST_BUFFERS = 512
"""Buffers in one vectored call; the system allows 1024 (IOV_MAX)."""


def move_rows(file: int, offsets: Slots, memory: Bytes, rows: Slots, *, write: bool) -> int:
    """See `MoveRows`: neighbours in the file go in one vectored call."""
    row_bytes, moved = memory.shape[1], 0
    call = os.pwritev if write else os.preadv
    starts = np.flatnonzero(np.diff(offsets, prepend=offsets[:1] - 2 * row_bytes) != row_bytes)
    for start, end in pairwise([*starts.tolist(), len(rows)]):
        for first in range(start, end, _MOST_BUFFERS):
            buffers = [memoryview(memory[row]) for row in rows[first : min(end, first + _MOST_BUFFERS)].tolist()]
            done = call(file, buffers, int(offsets[first]))
            moved += done
            if done < len(buffers) * row_bytes:
                return moved
    return moved
