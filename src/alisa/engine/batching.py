"""Who runs in the next step: first come, first served, within the lanes and rows that are free.

Prompts are read before running sequences go on, in pieces of at most `prefill_chunk` tokens. The pieces of one prompt
are cut at multiples of that number, whatever else is in the batch: a request's arithmetic does not depend on its
company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from alisa.engine.requests import Request, Sequence
from alisa.types import Phase, Segment, StepPlan


def next_plan(step: int, running: Seq[Sequence], prefill_chunk: int) -> StepPlan | None:
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
        return StepPlan(step, Phase.DEVICE, prefill=True, segments=tuple(segments))
    if not running:
        return None
    decode = tuple(Segment(sequence.lane, sequence.num_cached, 1) for sequence in running)
    return StepPlan(step, Phase.DEVICE, prefill=False, segments=decode)


class WaitingLine:
    """Requests that have not been admitted yet, oldest first."""

    def __init__(self) -> None:
        self._line: deque[tuple[Request, float]] = deque()

    def join(self, request: Request, now_s: float) -> None:
        """Queue up at the end."""
        self._line.append((request, now_s))

    def first(self) -> Request | None:
        """The request whose turn it is."""
        return self._line[0][0] if self._line else None

    def admit(self) -> tuple[Request, float]:
        """Take the first request out, with the time at which it joined."""
        return self._line.popleft()
