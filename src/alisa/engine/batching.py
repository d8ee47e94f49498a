"""Who runs in the next step: first come, first served, within the lanes and rows that are free.

Prompts are read before running sequences go on, in pieces of at most `prefill_chunk` tokens. The pieces of one prompt
are cut at multiples of that number, whatever else is in the batch: a request's arithmetic does not depend on its
company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from alisa.engine.requests import Request, Sequence
from alisa.types import Segment


@dataclass(frozen=True, slots=True)
class Work:
    """What goes through the model in a step: pieces of prompts, or one new token for each sequence."""

    prefill: bool
    segments: tuple[Segment, ...]


def next_work(running: Seq[Sequence], prefill_chunk: int) -> Work | None:
    """Pieces of the prompts that are still unread, else one token of every running sequence; None when nobody runs."""
    segments: list[Segment] = []
    num_tokens = 0
    for sequence in running:
        if not sequence.in_prefill:
            continue
        count = min(prefill_chunk, sequence.prompt_len - sequence.num_cached)
        if segments and num_tokens + count > prefill_chunk:
            break
        segments.append(Segment(sequence.lane, sequence.num_cached, count))
        num_tokens += count
    if segments:
        return Work(prefill=True, segments=tuple(segments))
    if not running:
        return None
    return Work(prefill=False, segments=tuple(Segment(sequence.lane, sequence.num_cached, 1) for sequence in running))


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that has no lane: a new one, or one that lost its rows and its lane to older ones."""

    request: Request
    since_s: float
    former: Sequence | None = None


class WaitingLine:
    """Requests without a lane, oldest first; those that had one before stand in front."""

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
