"""What goes through the model next: pieces of prompts, or one new token for each sequence.

Prompts are read before running sequences go on, in pieces of at most `prefill_chunk` tokens. The pieces of one prompt
are cut at multiples of that number, whatever else is in the batch: a request's arithmetic does not depend on its
company.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alisa.scheduler.plan import ScheduledChunk


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


def next_work(running: Sequence[Running], prefill_chunk: int) -> Work | None:
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
