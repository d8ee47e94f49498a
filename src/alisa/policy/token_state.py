"""State with something for every token: tables in one space that all sequences share.

    table [..., T, ...]    token p of a sequence is entry start + p along the token dimension

T is what the memory cap has room for, whoever uses it. The tables are allocated but not touched: the system backs
their memory as tokens come.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.kernels.base import StepBatch
from alisa.policy.base import PolicyState
from alisa.policy.extents import Extents, TokenMove


class _Table(NamedTuple):
    tensor: Tensor
    token_dim: int
    zeroed: bool

    def tokens(self, start: int, count: int) -> Tensor:
        return self.tensor.narrow(self.token_dim, start, count)


class TokenState(PolicyState):
    """What states with tables share: room, moves, and where each sequence begins.

    Args:
        max_num_seqs: request indices are below it.
        num_tokens: of all sequences together, each rounded up to whole blocks.
        device: of the tables.
    """

    def __init__(self, *, max_num_seqs: int, num_tokens: int, device: torch.device) -> None:
        self._extents = Extents(num_tokens)
        self._device = device
        self._start_table = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._tables: list[_Table] = []
        self._sequence_bytes = 0
        self._batch: StepBatch | None = None
        self._appended: tuple[Tensor, Tensor] | None = None
        self._append_ids = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """The extents of the open sequences, and what each has in addition."""
        tokens = self._extents.used_tokens
        taken = sum(table.tensor.nbytes // self._num_tokens for table in self._tables) if tokens else 0
        return tokens * taken + self._extents.num_open * self._sequence_bytes

    def open(self, req_idx: int, expected_tokens: int) -> None:
        """The sequence has no room yet; `reserve` gives it some."""
        self._extents.open(req_idx, expected_tokens)

    def reserve(self, req_idx: int, num_tokens: int) -> None:
        """There is room; what is new of it is zero in the tables that want that."""
        extents = self._extents
        former = extents.size(req_idx)
        moves = extents.reserve(req_idx, num_tokens)
        size = extents.size(req_idx)
        if size == former:
            return
        for move in moves:
            self._move(move)
        start = extents.start(req_idx)
        for table in self._tables:
            if table.zeroed:
                table.tokens(start + former, size - former).zero_()
        self._update_starts(req_idx, moved=bool(moves))

    def fork(self, source: int, req_idx: int) -> None:
        """Every table has the same of both."""
        start, count = self._extents.start(source), self._extents.size(source)
        for table in self._tables:
            table.tokens(self._extents.start(req_idx), count).copy_(table.tokens(start, count))

    def close(self, req_idx: int) -> None:
        """The room is free; the last step, in which the sequence may have been, is over."""
        self._extents.close(req_idx)
        if self._batch is not None and req_idx in self._batch.req_indices:
            self._batch = None  # its step is over, and whoever moves now need not find it again

    def begin(self, batch: StepBatch) -> None:
        """Find the sequences."""
        self._batch = batch
        self._locate(batch, self._start_table.index_select(0, batch.req_index))

    @property
    def _num_tokens(self) -> int:
        """T, the size of the space."""
        return self._extents.num_tokens

    def _new_table(
        self, before: tuple[int, ...], after: tuple[int, ...], dtype: torch.dtype, *, zeroed: bool = False
    ) -> Tensor:
        """A table `[*before, T, *after]`; `zeroed`: a token begins with 0, otherwise with anything.

        What is zeroed are sums: many rows of few bytes for each token, so that the first tokens touch all of the table
        here and there. A huge page for every touch would back it whole (1.1 GiB instead of 6 MiB for `swa`, 512 tokens
        of OPT-1.3B, room for 200,000).
        """
        shape = (*before, self._num_tokens, *after)
        if zeroed and self._device.type == "cpu" and sys.platform == "linux":
            tensor = _small_pages(shape, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._tables.append(_Table(tensor, len(before), zeroed))
        return tensor

    def _locate(self, batch: StepBatch, starts: Tensor) -> None:
        """Sequences of the running step begin at `starts` Int64[B]; called again when one of them has moved."""
        raise NotImplementedError

    def _token_ids(self, req_index: Tensor, positions: Tensor) -> Tensor:
        """Int64[N]: entries of these tokens; computed once for all layers, which ask with the same two tensors."""
        asked = self._appended
        if asked is None or asked[0] is not req_index or asked[1] is not positions:
            self._append_ids = self._start_table.index_select(0, req_index).add_(positions)
            self._appended = (req_index, positions)
        return self._append_ids

    def _move(self, move: TokenMove) -> None:
        """Every table has the tokens at their new place; ranges that overlap are moved in pieces that do not."""
        source, target, count = move
        most = abs(target - source)
        offsets = range(0, count, most)
        for offset in offsets if target < source else reversed(offsets):
            some = min(most, count - offset)
            for table in self._tables:
                table.tokens(target + offset, some).copy_(table.tokens(source + offset, some))

    def _update_starts(self, req_idx: int, *, moved: bool) -> None:
        """The device knows where sequences begin; a step that has begun goes on at the new places."""
        self._appended = None
        if not moved:
            self._start_table[req_idx] = self._extents.start(req_idx)
            return
        starts = [self._extents.start(i) if i in self._extents else 0 for i in range(len(self._start_table))]
        self._start_table.copy_(torch.tensor(starts))
        if self._batch is not None:
            self._locate(self._batch, self._start_table.index_select(0, self._batch.req_index))


def _small_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that takes memory as it is written, 4 KiB at a time whatever torch or the system prefer."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages refuses
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
