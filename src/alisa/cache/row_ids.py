"""Row ids: one number for each token of an open sequence, by which tables say where its rows lie.

A sequence's positions are cut into blocks of `BLOCK_TOKENS`; a block has a number of its own while it is in use, and
row id = block * BLOCK_TOKENS + offset. Tables that are keyed by row id are as long as the tokens that exist, not as
`max_num_seqs` times the longest sequence; and two sequences could name the same block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alisa.cache.free_slots import FreeSlots

BLOCK_TOKENS = 16
"""Tokens of a block."""

Ids = NDArray[np.int64]
"""Row ids."""

NOWHERE = -1
"""In a table that is keyed by row id: the row is not there."""


class RowIds:
    """Maps (req_idx, position) to row ids.

    Its own table takes `max_num_seqs * max_length / 4` bytes if every sequence becomes as long as it may.

    Args:
        max_num_seqs: request indices are below this.
        max_length: longest sequence, in tokens.
    """

    def __init__(self, max_num_seqs: int, max_length: int) -> None:
        blocks_per_seq = -(-max_length // BLOCK_TOKENS)
        self._free = FreeSlots(max_num_seqs * blocks_per_seq)
        # What to add to a position to get its row id, for each block of a sequence. Pages of zeros that nobody writes
        # take no memory.
        self._offsets = np.zeros((max_num_seqs, blocks_per_seq), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int64)
        self._block_starts = np.empty(0, np.int32)  # position of the first token of each block
        self.capacity = 0
        """Row ids are below this; it grows by a quarter when it has to, and never shrinks."""

    def extend(self, req_idx: int, length: int) -> None:
        """Positions below `length` have row ids."""
        have, want = int(self._num_blocks[req_idx]), -(-length // BLOCK_TOKENS)
        if want <= have:
            return
        blocks = self._free.take(want - have)
        starts = np.arange(have, want, dtype=np.int32) * BLOCK_TOKENS
        self._reserve(int(blocks.max()) + 1)
        self._block_starts[blocks] = starts
        self._offsets[req_idx, have:want] = blocks * BLOCK_TOKENS - starts
        self._num_blocks[req_idx] = want

    def release(self, req_idx: int) -> None:
        """The sequence's row ids may be given to another."""
        self._free.give_back(self._blocks(req_idx)[::-1].tolist())
        self._num_blocks[req_idx] = 0

    def of(self, req_idx: int, start: int, end: int) -> Ids:
        """Row ids of positions [start, end) of a sequence, Int64[end - start]."""
        assert end <= self._num_blocks[req_idx] * BLOCK_TOKENS, f"position {end - 1} of {req_idx} has no row id"
        positions = np.arange(start, end)
        return self._offsets[req_idx, positions // BLOCK_TOKENS] + positions

    def lookup(self, req_indices: NDArray[np.int64], positions: NDArray[np.int32] | NDArray[np.int64]) -> Ids:
        """Row ids of positions that have one; the two arrays broadcast."""
        return self._offsets[req_indices, positions // BLOCK_TOKENS] + positions.astype(np.int64)

    def positions(self, ids: Ids) -> NDArray[np.int64]:
        """Position of each row in its sequence."""
        return self._block_starts[ids // BLOCK_TOKENS] + ids % BLOCK_TOKENS

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, as far as they are used."""
        return 4 * (int(self._num_blocks.sum()) + len(self._block_starts))

    def check(self) -> None:
        """Assert that no block is lost or belongs to two sequences."""
        blocks = [block for req_idx in range(len(self._num_blocks)) for block in self._blocks(req_idx).tolist()]
        self._free.check(blocks)

    def _blocks(self, req_idx: int) -> NDArray[np.int32]:
        count = int(self._num_blocks[req_idx])
        starts = np.arange(count, dtype=np.int32) * BLOCK_TOKENS
        return (self._offsets[req_idx, :count] + starts) // BLOCK_TOKENS

    def _reserve(self, num_blocks: int) -> None:
        if num_blocks > len(self._block_starts):
            grown = np.zeros(grown_size(len(self._block_starts), num_blocks), np.int32)
            grown[: len(self._block_starts)] = self._block_starts
            self._block_starts = grown
            self.capacity = len(grown) * BLOCK_TOKENS


def grown_size(size: int, needed: int) -> int:
    """The size to which a table of `size` entries grows when it needs `needed`: a quarter more, or that."""
    return max(needed, size + size // 4)
