"""What a step does, decided before any of it is done: frozen integers.

The engine executes them, the simulator prices them, a search ranks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from alisa.budget import Budget
from alisa.outputs import Medium, Phase
from alisa.scheduler.prefix import BlockName


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """A run of consecutive tokens of one sequence that goes through the model in one step.

    Positions [start, start + count) of the sequence with request index `req_idx`. In a decode step `count` is 1, or
    more where the tokens are known or guessed: each gets what it would get in a step of its own.
    """

    req_idx: int
    start: int
    count: int
    source: int | None = None
    """Another sequence that has the same rows up to the end of the chunk, by then: they can be shared, and all before
    the chunk are. None: the chunk gets rows of its own."""

    @property
    def end(self) -> int:
        """Length of the sequence after this step: the position after the chunk."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Move:
    """Rows [start, end) of one sequence, all layers, that go from one medium to another (None: deleted).

    Moves only go to lower tiers. One out of DEVICE may name positions that this step computes: they are written to the
    lower tier at once.
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
class Opened:
    """A request that takes a request index: the cache and the policy make room for it before the step."""

    req_idx: int
    request_id: str
    num_tokens: int
    """Rows that it may come to need."""
    prompt_len: int
    """Tokens of its prompt: the last of them are what the policy observes."""
    block_names: tuple[BlockName, ...] = ()
    """Names of the whole blocks of its prompt; none where no prefix cache keeps them."""
    budget: Budget | None = None
    """How much its decode steps may read; None: what the policy's own budget says."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that was decided about one step, before any of it is done."""

    step: int
    phase: Phase
    prefill: bool
    """True: the chunks are pieces of prompts; False: new tokens of each sequence."""
    chunks: tuple[ScheduledChunk, ...]
    moves: tuple[Move, ...] = ()
    opened: tuple[Opened, ...] = ()
    closed: tuple[int, ...] = ()
    """Request indices whose rows are dropped before the step. They are closed before `opened` are opened: an index may
    be in both."""
    num_preempted: int = 0
    """Requests that were swapped or lost their rows when this step was planned."""
    restored: bool = False
    """True, with `prefill`: K and V of the chunks come from the prefix cache, and nothing is computed."""
    is_draft: bool = False
    """True: what the step says is a guess, and its rows are taken back; see `alisa.engine.drafter`."""

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(chunk.count for chunk in self.chunks)
