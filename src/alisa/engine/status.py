"""What an engine is doing right now, as plain values that any thread may read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request that is not finished. Times are ages in seconds; None: it has not come to that."""

    request_id: str
    status: str
    """`waiting`, `prefill`, `decode` or `swapped`."""
    priority: int
    prompt_tokens: int
    tokens_read: int
    """Tokens of the prompt that have been read."""
    output_tokens: int
    arrived_s: float
    admitted_s: float | None
    first_token_s: float | None


@dataclass(frozen=True, slots=True)
class AnswerView:
    """Reading what was said, for the prefix cache, while no request is open."""

    num_tokens: int
    """Of the conversation up to the end of that answer."""
    tokens_read: int
    num_waiting: int
    """Answers that are read after it."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Requests and memory between two steps."""

    requests: tuple[RequestView, ...]
    """In the order of their arrival."""
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    answer_tokens: int = 0
    """Tokens of answers that were read so far while nobody waited."""
    answer: AnswerView | None = None
    """The one that is being read; None: none is."""

    def count(self, *statuses: str) -> int:
        """Requests with one of these."""
        return sum(request.status in statuses for request in self.requests)
