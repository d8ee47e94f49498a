"""A selection that is larger than the pool, cut into pieces that buffers can hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Piece(NamedTuple):
    """Columns begins[b] to ends[b] - 1 of each sequence, Int32[B]."""

    begins: NDArray[np.int32]
    ends: NDArray[np.int32]

    def holds(self, width: int) -> NDArray[np.bool_]:
        """Bool[B, width]: the columns of this piece."""
        columns = np.arange(width)
        return (columns >= self.begins[:, None]) & (columns < self.ends[:, None])


def cut_pieces(missing: NDArray[np.bool_], counts: NDArray[np.int64], step: int, num_rows: int) -> list[Piece]:
    """A selection cut at multiples of `step` columns, so that no piece lacks more than `num_rows` rows.

    Args:
        missing: Bool[B, K], the rows that a piece brings.
        counts: columns of each sequence.
        step: at most `num_rows`.
        num_rows: at least 1.
    """
    pieces: list[Piece] = []
    begins, ends = np.zeros((2, len(counts)), np.int32)
    room = num_rows
    for sequence, count in enumerate(counts.tolist()):
        for first in range(0, count, step):
            needed = int(np.count_nonzero(missing[sequence, first : first + step]))
            if needed > room:
                pieces.append(Piece(begins.copy(), ends.copy()))
                begins[:] = ends
                room = num_rows
            room -= needed
            ends[sequence] = min(first + step, count)
    return [*pieces, Piece(begins, ends)]
