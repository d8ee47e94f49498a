"""Who owns which part of one space of tokens: integers only.

    0 ................................................... num_tokens
    [ sequence 3 ]      [ seq 0 ]   [ sequence 7     ]

Every open sequence owns one contiguous extent of whole blocks, and says how long it may become. A new extent takes the
first place where it can grow so far, close behind the others: memory that has been used is used again, and what is next
to it shares its pages (one huge page for each of a hundred tables, for every extent that lies alone, is more than all
the state of a short text). Where nobody can be sure of so much room, an extent takes the middle of the largest gap; one
that cannot grow moves, and where no gap is large enough, all extents are laid out anew with equal gaps. So whatever
fits in sum, fits.
"""

from __future__ import annotations

from typing import NamedTuple

from alisa.budget import STATE_BLOCK_TOKENS, state_tokens


class TokenMove(NamedTuple):
    """`count` tokens from `source` on now belong at `target`; the two ranges may overlap."""

    source: int
    target: int
    count: int


class _Extent(NamedTuple):
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Extents:
    """The extents of all open sequences in a space of `num_tokens` tokens, rounded down to whole blocks."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens // STATE_BLOCK_TOKENS * STATE_BLOCK_TOKENS
        """Size of the space."""
        self._extents: dict[int, _Extent] = {}
        self._expected: dict[int, int] = {}

    @property
    def num_open(self) -> int:
        """Open sequences."""
        return len(self._extents)

    @property
    def used_tokens(self) -> int:
        """Tokens that belong to a sequence."""
        return sum(extent.size for extent in self._extents.values())

    def open(self, req_idx: int, expected_tokens: int) -> None:
        """The sequence has an empty extent; it may come to so many tokens."""
        self._extents[req_idx] = _Extent(0, 0)
        self._expected[req_idx] = state_tokens(expected_tokens)

    def close(self, req_idx: int) -> None:
        """The sequence's extent is free."""
        del self._extents[req_idx], self._expected[req_idx]

    def __contains__(self, req_idx: int) -> bool:
        return req_idx in self._extents

    def start(self, req_idx: int) -> int:
        """Where the extent begins."""
        return self._extents[req_idx].start

    def size(self, req_idx: int) -> int:
        """Tokens that the extent has room for."""
        return self._extents[req_idx].size

    def reserve(self, req_idx: int, num_tokens: int) -> list[TokenMove]:
        """The extent has room for `num_tokens` tokens, after these moves have been made in this order."""
        former = self._extents[req_idx]
        size = state_tokens(num_tokens)
        if size <= former.size:
            return []
        total = self.used_tokens - former.size + size
        assert total <= self.num_tokens, f"{total} tokens of policy state do not fit {self.num_tokens}"
        others = sorted((extent, key) for key, extent in self._extents.items() if key != req_idx and extent.size)
        gaps = self._gaps([extent for extent, _ in others])
        if former.size and any(gap.start <= former.start and former.start + size <= gap.end for gap in gaps):
            self._extents[req_idx] = _Extent(former.start, size)
            return []
        start = self._sure_place(others, max(size, self._expected[req_idx]))
        if start is None:
            gap = max(gaps, key=lambda gap: gap.size)
            if gap.size < size:
                return self._lay_out(req_idx, size)
            # Half of what is left of the gap is for whoever comes before it to grow into.
            start = gap.start + _half(gap.size - size) if gap.start else 0
        self._extents[req_idx] = _Extent(start, size)
        return [TokenMove(former.start, start, former.size)] if former.size and start != former.start else []

    def _sure_place(self, others: list[tuple[_Extent, int]], size: int) -> int | None:
        """The first place for `size` tokens that the others, in order, will not grow into; None: there is none."""
        start = 0
        for extent, key in others:
            if extent.start - start >= size:
                return start
            start = max(start, extent.start + max(extent.size, self._expected[key]))
        return start if self.num_tokens - start >= size else None

    def _gaps(self, extents: list[_Extent]) -> list[_Extent]:
        """What lies before, between and after these extents, in order; some may be empty."""
        starts = [0, *(extent.end for extent in extents)]
        ends = [*(extent.start for extent in extents), self.num_tokens]
        return [_Extent(start, end - start) for start, end in zip(starts, ends, strict=True)]

    def _lay_out(self, req_idx: int, size: int) -> list[TokenMove]:
        """Extents keep their order and get equal gaps; one of them has a new size."""
        former = self._extents
        # Without a place of its own yet, the sequence comes last.
        place = former[req_idx].start if former[req_idx].size else self.num_tokens
        order = [key for key, extent in former.items() if extent.size and key != req_idx]
        order = sorted([*order, req_idx], key=lambda key: place if key == req_idx else former[key].start)
        sizes = [size if key == req_idx else former[key].size for key in order]
        free_blocks = (self.num_tokens - sum(sizes)) // STATE_BLOCK_TOKENS
        moves: list[TokenMove] = []
        end = 0
        for index, (key, own_size) in enumerate(zip(order, sizes, strict=True)):
            gap = free_blocks * (index + 1) // len(order) - free_blocks * index // len(order)
            extent = former[key]
            self._extents[key] = _Extent(end, own_size)
            if extent.size and extent.start != end:
                moves.append(TokenMove(extent.start, end, extent.size))
            end += own_size + gap * STATE_BLOCK_TOKENS
        # Who moves down makes room for who comes after it, who moves up for who came before it. The two never meet:
        # the order stays, so a place that one moves up to ends before the one after it begins, formerly and now.
        down = [move for move in moves if move.target < move.source]
        up = [move for move in moves if move.target > move.source]
        return [*down, *reversed(up)]


def _half(num_tokens: int) -> int:
    """Half of a multiple of the block, in whole blocks."""
    return num_tokens // (2 * STATE_BLOCK_TOKENS) * STATE_BLOCK_TOKENS
