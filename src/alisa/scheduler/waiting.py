"""Who waits for a request index: first come, first served, within the req_indices and rows that are free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from alisa.scheduler.request import Request, Sequence


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has no request index: a new one, or one that lost its rows and its request index to older ones."""

    request: Request
    since_s: float
    former: Sequence | None = None


class WaitingLine:
    """Requests without a request index, oldest first; those that had one before stand in front."""

    def __init__(self) -> None:
        self._line: deque[Waiting] = deque()

    def join(self, waiting: Waiting) -> None:
        """Queue up at the end."""
        self._line.append(waiting)

    def step_back(self, sequence: Sequence) -> None:
        """A running sequence has lost its rows: it is the next to be admitted."""
        self._line.appendleft(Waiting(sequence.request, sequence.submitted_s, sequence))

    def first(self) -> Waiting | None:
        """The request whose turn it is."""
        return self._line[0] if self._line else None

    def admit(self) -> Waiting:
        """Take the first request out."""
        return self._line.popleft()
