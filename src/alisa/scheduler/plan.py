"""What a step does, decided before any of it is done: frozen integers.

The engine executes them, the simulator prices them, a search ranks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from alisa.outputs import Medium, Phase


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A run of consecutive tokens of one sequence that goes through the model in one step.

    Positions [start, start + count) of req_idx `req_idx`; `count` is 1 in a decode step.
    """

    req_idx: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Length of the sequence after this step: the position after the chunk."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Move:
    """Rows [start, end) of one sequence, all layers, that go from one medium to another (None: deleted).

    Moves go down only. One out of DEVICE may name positions that this step computes: they are written below at once.
    """

    req_idx: int
    start: int
    end: int
    source: Medium
    target: Medium | None

    @property
    def num_tokens(self) -> int:
        """Tokens that move."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that was decided about one step, before any of it is done."""

    step: int
    phase: Phase
    prefill: bool
    """True: the chunks are pieces of prompts; False: one new token for each sequence."""
    chunks: tuple[ScheduledChunk, ...]
    moves: tuple[Move, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(segment.count for segment in self.chunks)
