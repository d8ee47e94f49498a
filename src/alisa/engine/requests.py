"""A request as it was asked, and the sequence it becomes while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from alisa.config import SamplingParams
from alisa.outputs import FinishReason
from alisa.scheduler.plan import ScheduledChunk


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids, and how to continue it."""

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    """`params.max_tokens`, or less where the model's positions end earlier."""

    @property
    def num_rows(self) -> int:
        """KV rows the request may come to need: the last token is returned, never fed."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request: its request index, its tokens, how far they are cached, and what it has cost so far."""

    request: Request
    req_idx: int
    submitted_s: float
    admitted_s: float
    token_ids: list[int]
    """Prompt and output."""
    num_cached: int = 0
    """Tokens whose rows are in the store."""
    first_token_s: float = 0.0
    finished_s: float = 0.0
    finish_reason: FinishReason | None = None
    error: str = ""
    """Why it ended with the reason `error`."""
    tokens_attended: int = 0
    tokens_dense: int = 0
    num_preempted: int = 0
    """How often it had to give way."""
    output_ids: list[int] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_cached < self.prompt_len

    @property
    def wants_token(self) -> bool:
        """Whether everything up to the newest token has been through the model, so that the next can be chosen.

        False while a prompt is read, and while a sequence that lost its rows catches up with what it had said.
        """
        return self.num_cached == len(self.token_ids)

    def append(self, token_id: int) -> None:
        """Take in a sampled token."""
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)


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


class Running(Protocol):
    """A sequence that has a request index, as far as this file cares."""

    @property
    def req_idx(self) -> int:
        """Its req_idx."""
        ...

    @property
    def prompt_len(self) -> int:
        """Tokens of its prompt."""
        ...

    @property
    def num_cached(self) -> int:
        """Tokens whose rows are in the store."""
        ...

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still unread."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What goes through the model in a step: pieces of prompts, or one new token for each sequence."""

    prefill: bool
    segments: tuple[ScheduledChunk, ...]


def next_work(running: SequenceOf[Running], prefill_chunk: int) -> Work | None:
    """Pieces of the prompts that are still unread, else one token of every running sequence; None when nobody runs."""
    segments: list[ScheduledChunk] = []
    num_tokens = 0
    for sequence in running:
        if not sequence.in_prefill:
            continue
        count = min(prefill_chunk, sequence.prompt_len - sequence.num_cached)
        if segments and num_tokens + count > prefill_chunk:
            break
        segments.append(ScheduledChunk(sequence.req_idx, sequence.num_cached, count))
        num_tokens += count
    if segments:
        return Work(prefill=True, segments=tuple(segments))
    if not running:
        return None
    return Work(
        prefill=False, segments=tuple(ScheduledChunk(sequence.req_idx, sequence.num_cached, 1) for sequence in running)
    )
