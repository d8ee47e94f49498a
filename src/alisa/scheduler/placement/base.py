"""What a placement policy sees and what it decides: integers only, shared by an engine, a simulator and a search.

A sequence's rows are placed by prefix, oldest first (ALISA, section 5): the tiers below the device hold ranges of
positions that end where the tier above begins, and what was deleted lies before them all.

    position   0 .......... x .......... e .......... d .......... length
               [  deleted  ][   disk    ][   host    ][   device   ]
    bounds                 [2]          [1]          [0]

A row in a lower tier may have a copy in the device's hot cache; that is the store's business, not the policy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from alisa.budget import Reads, state_tokens
from alisa.outputs import Medium, Phase
from alisa.scheduler.plan import Move


@dataclass(frozen=True, slots=True)
class Tier:
    """A lower tier: what it is and how many tokens (rows of all layers) it may hold."""

    medium: Medium
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Capacities in tokens."""

    device_tokens: int
    """R: what the device pool holds, its hot cache included."""
    tiers: tuple[Tier, ...] = ()
    """Lower tiers, nearest first."""
    rebuildable: int = 0
    """First tokens of every sequence whose hidden states are kept."""
    state_tokens: int | None = None
    """Tokens for which the selection policy has room in its state, over all sequences wherever their rows lie; each
    sequence takes whole blocks (`alisa.budget.state_tokens`). None: no limit."""

    @property
    def total_tokens(self) -> int:
        """Tokens that can be kept without deleting any."""
        return self.device_tokens + sum(tier.num_tokens for tier in self.tiers)

    def has_state_room(self, lengths: Iterable[int]) -> bool:
        """Whether the policy's state has room for sequences of these lengths."""
        if self.state_tokens is None:
            return True
        return sum(map(state_tokens, lengths)) <= self.state_tokens


@dataclass(frozen=True, slots=True)
class SeqView:
    """One sequence as a placement policy sees it, before a step."""

    req_idx: int
    prompt_len: int
    length: int
    """Tokens after the step."""
    bounds: tuple[int, ...]
    """Where each lower tier ends (see the module), nearest first, then the end of what is deleted; now."""
    window: int
    """Most recent tokens that every step reads: they stay on the device while it has room."""
    older: int
    """Further tokens, among all before the window, that one layer reads in this step."""
    rebuildable: int = 0
    """Positions below this have their hidden states kept, so that their rows may be deleted."""
    active: bool = True
    """False: the sequence takes no part in this step; its rows may all be offloaded."""
    num_new: int = 1
    """Newest tokens that stay on the device in this step: rows that may be taken back have not moved."""
    num_shared: int = 0
    """First tokens whose rows another sequence has and counts; 0 where rows may move, which takes rows of its own."""

    @property
    def output_step(self) -> int:
        """J in the paper: tokens generated so far, the one of this step included; 0 or less while a prompt is read."""
        return self.length - self.prompt_len

    @property
    def num_read(self) -> int:
        """Tokens that one layer reads in this step."""
        return min(self.window + self.older, self.length)


def seq_view(
    req_idx: int,
    prompt_len: int,
    length: int,
    bounds: tuple[int, ...],
    rebuildable: int,
    reads: Reads,
    *,
    active: bool,
    num_new: int = 1,
    num_shared: int = 0,
) -> SeqView:
    """A sequence before a step after which it has `length` tokens, of which a policy reads what `reads` says."""
    recent, older = reads(max(length - 1, 0))
    return SeqView(
        req_idx=req_idx,
        prompt_len=prompt_len,
        length=length,
        bounds=bounds,
        window=min(recent + num_new, length),
        older=older,
        rebuildable=rebuildable,
        active=active,
        num_new=num_new,
        num_shared=num_shared,
    )


def fresh_view(num_tokens: int, limits: Limits, reads: Reads, num_shared: int = 0) -> SeqView:
    """A sequence of `num_tokens` tokens that has no request index yet, and will share the first `num_shared`."""
    bounds = (0,) * (len(limits.tiers) + 1)
    return seq_view(-1, num_tokens, num_tokens, bounds, limits.rebuildable, reads, active=True, num_shared=num_shared)


class PlacementDecision(NamedTuple):
    """What a placement policy wants done before a step."""

    phase: Phase
    moves: tuple[Move, ...]


class PlacementPolicy(Protocol):
    """Frozen parameters of a way to place rows."""

    @property
    def name(self) -> str:
        """The name in reports and schedule files."""
        ...

    @property
    def uses_tiers(self) -> bool:
        """Whether it ever moves rows."""
        ...

    def most_deleted(self, num_tokens: int) -> int:
        """Tokens of a sequence of this final length that it plans to delete; pressure may delete others."""
        ...

    @property
    def avoids_oversubscription(self) -> bool:
        """Whether fewer sequences should run at a time when together they read more than the device holds."""
        ...

    def plan(self, sequences: Sequence[SeqView], limits: Limits) -> PlacementDecision | None:
        """Moves after which every sequence has room for its length; None when no placement of all of them fits."""
        ...


def is_oversubscribed(placement: PlacementPolicy, limits: Limits, num_read: Iterable[int]) -> bool:
    """Whether running sequences read more in one layer than the device holds, and some had better wait.

    `num_read`: tokens that each of them reads.
    """
    return bool(limits.tiers) and placement.avoids_oversubscription and sum(num_read) > limits.device_tokens


def moves_down(sequences: Sequence[SeqView], bounds: Sequence[Sequence[int]], limits: Limits) -> tuple[Move, ...]:
    """The moves that take every sequence from its present bounds to lower ones.

    Deepest first over all sequences: what one of them sends to a full tier may need the room that another leaves.
    """
    media: list[Medium | None] = [Medium.DEVICE, *(tier.medium for tier in limits.tiers), None]
    found: list[tuple[int, Move]] = []
    for view, ends in zip(sequences, bounds, strict=True):
        for start, end in pairwise(sorted({0, *view.bounds, *ends})):
            source, target = _level(start, view.bounds), _level(start, ends)
            medium = media[source]
            if target > source and medium is not None:
                found.append((target, Move(view.req_idx, start, end, medium, media[target])))
    return tuple(move for _, move in sorted(found, key=lambda item: -item[0]))


def _level(position: int, bounds: Sequence[int]) -> int:
    """0 for the device, 1 for the nearest tier, ...: how many bounds lie after the position."""
    return sum(position < bound for bound in bounds)


def phase_of(bounds: Sequence[int]) -> Phase:
    """The phase in which a sequence with these bounds is."""
    if bounds and bounds[-1]:
        return Phase.RECOMPUTE
    return Phase.DEVICE_HOST if any(bounds) else Phase.DEVICE


PHASE_ORDER = (Phase.DEVICE, Phase.DEVICE_HOST, Phase.RECOMPUTE)


def latest_phase(phases: Sequence[Phase]) -> Phase:
    """The phase of a batch: that of the sequence which is furthest on."""
    return max(phases, key=PHASE_ORDER.index, default=Phase.DEVICE)
