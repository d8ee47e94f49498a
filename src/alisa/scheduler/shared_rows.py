"""Sequences that begin with the same rows: which of them counts a row, so that each is counted once. Integers only.

A sequence may have the first rows of another one, its source, instead of rows of its own. A row belongs to the one
sequence that has it and did not get it from its source:

    0: [ its own ........................................ )
    1: [ those of 0 ........ )[ its own ................. )
    2: [ those of 1 ................ )[ its own ......... )

A sequence that leaves hands over what others have of its rows, to the one of them that has most. Rows are only ever
appended and dropped, never changed: nobody has to make a copy before it goes on in its own way.
"""

from __future__ import annotations

from typing import NamedTuple


class Handover(NamedTuple):
    """Rows of positions [start, end), which belonged to one sequence, belong to another."""

    heir: int
    start: int
    end: int


class _Link(NamedTuple):
    source: int
    count: int


class SharedRows:
    """Who has rows of whom, by request index; a sequence that shares nothing need not be known.

    A sequence always shares more with its source than that one with its own: what it shares with both, it has from the
    latter. So counts fall from a sequence to its source, and on to the next.
    """

    def __init__(self) -> None:
        self._links: dict[int, _Link] = {}

    def num_shared(self, req_idx: int) -> int:
        """First tokens of the sequence whose rows belong to others."""
        link = self._links.get(req_idx)
        return 0 if link is None else link.count

    def common(self, first: int, second: int) -> int:
        """First tokens for which two different sequences have the same rows."""
        count = 0
        while first != second:
            # The one that shares more is no source of the other, neither at once nor in the end.
            if self.num_shared(first) < self.num_shared(second):
                first, second = second, first
            if first not in self._links:
                return 0
            first, count = self._links[first]
        return count

    def share(self, req_idx: int, source: int, count: int) -> None:
        """The first `count` tokens of a sequence have the rows of these tokens of `source`; it has none of its own."""
        if not count:
            self._links.pop(req_idx, None)
            return
        while count <= self.num_shared(source):
            source = self._links[source].source
        assert source != req_idx, "a sequence cannot have its rows from itself"
        self._links[req_idx] = _Link(source, count)

    def cut(self, req_idx: int, length: int) -> Handover | None:
        """The sequence has no rows from position `length` on; what others have of those belongs to one of them."""
        shared = self.num_shared(req_idx)
        start = max(shared, length)
        readers = [each for each, link in self._links.items() if link.source == req_idx and link.count > start]
        handover = None
        if readers:
            heir = max(readers, key=self.num_shared)
            handover = Handover(heir, start, self.num_shared(heir))
            self.share(heir, req_idx, start)
            for reader in readers:
                if reader != heir:
                    self.share(reader, heir, self.num_shared(reader))
        if length < shared:
            self.share(req_idx, self._links[req_idx].source, length)
        return handover
