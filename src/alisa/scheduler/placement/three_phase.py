"""Token-level dynamic scheduling in three phases (ALISA, arXiv 2403.17312, section 5 and Algorithm 2).

I: everything on the device. II: a part of every sequence, its oldest tokens, is offloaded. III: the oldest of those are
deleted, and rebuilt when a step selects them. The paper switches at fixed steps p1 and p2 of an offline plan; here such
a `Schedule` says what is to happen at least, and measured pressure does the rest, sequence by sequence: a batch is
ragged, and a plan that was too hopeful must not end in an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alisa.errors import InputError
from alisa.outputs import Phase
from alisa.scheduler.placement.base import Limits, PlacementDecision, SeqView, latest_phase, moves_down, phase_of

CHUNK_TOKENS = 16
"""Tokens that are offloaded together at least: 16 rows of 8 KiB make one write of 128 KiB for each layer, which a disk
takes at its full rate, and 16 tokens more or less do not matter in any pool worth having."""

HOT_FACTOR = 2
"""Room for fetched rows that is aimed at, in units of what one layer selects of the tokens below: rows that were
selected lately and will be again need not be fetched twice. TensorRT-LLM's sparse offloading has the same default."""


_DEMANDS = ((HOT_FACTOR, True), (1, True), (0, False))
"""(Hot cache in units of a selection, whether windows stay on the device): what is aimed at, and what will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Where the phases begin and how much moves; counted for each sequence from its own first generated token.

    Raises:
        InputError: at construction, naming every field that is out of range.
    """

    offload_from: int
    """p1: first output step of phase II."""
    recompute_from: int
    """p2: first output step of phase III."""
    offload_ratio: float
    """alpha: share of a sequence's tokens that lie below the device in phases II and III."""
    recompute_ratio: float
    """beta: share of the tokens below the device that are deleted in phase III; 0: phase III never comes."""

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (not self.offload_from >= 0, f"offload_from is {self.offload_from}, allowed is 0 or more"),
                (
                    not self.recompute_from >= self.offload_from,
                    f"recompute_from is {self.recompute_from}, it cannot come before offload_from {self.offload_from}",
                ),
                (not 0 <= self.offload_ratio <= 1, f"offload_ratio is {self.offload_ratio}, allowed is 0 to 1"),
                (not 0 <= self.recompute_ratio <= 1, f"recompute_ratio is {self.recompute_ratio}, allowed is 0 to 1"),
            )
            if bad
        ]
        if wrong:
            raise InputError("; ".join(wrong) + ".")

    def offloaded(self, view: SeqView) -> int:
        """Tokens of the sequence that lie below the device, deleted ones included (alpha of its length)."""
        return int(self.offload_ratio * view.length) if view.output_step >= self.offload_from else 0

    def deleted(self, view: SeqView) -> int:
        """Of these, the oldest that are deleted (beta of the offloaded)."""
        return int(self.recompute_ratio * self.offloaded(view)) if view.output_step >= self.recompute_from else 0

    def most_deleted(self, num_tokens: int) -> int:
        """Tokens that a sequence of this final length may come to lose: their hidden states are kept."""
        return int(self.recompute_ratio * int(self.offload_ratio * num_tokens))


@dataclass(frozen=True)
class ThreePhase:
    """What a schedule asks for, if there is one, and as much more as the caps demand."""

    schedule: Schedule | None = None
    chunk: int = CHUNK_TOKENS
    name: Literal["three-phase"] = "three-phase"

    @property
    def uses_tiers(self) -> bool:
        """As soon as the schedule or the memory asks for it."""
        return True

    def most_deleted(self, num_tokens: int) -> int:
        """What the schedule says."""
        return 0 if self.schedule is None else self.schedule.most_deleted(num_tokens)

    @property
    def avoids_oversubscription(self) -> bool:
        """Reading from below in every layer of every step costs more than waiting."""
        return True

    def plan(self, sequences: Sequence[SeqView], limits: Limits) -> PlacementDecision | None:
        """See `PlacementPolicy.plan`."""
        if self.schedule is None and all_on_device(sequences, limits):
            return PlacementDecision(Phase.DEVICE, ())  # what the rest comes to, in a tenth of the time
        bounds = self._asked(sequences, limits)
        if not (self._relieve_device(sequences, bounds, limits) and self._relieve_tiers(sequences, bounds, limits)):
            return None
        return PlacementDecision(
            latest_phase([phase_of(ends) for ends in bounds]), moves_down(sequences, bounds, limits)
        )

    def _asked(self, sequences: Sequence[SeqView], limits: Limits) -> list[list[int]]:
        """The present bounds, or the lower ones of the schedule where they are a chunk or more away and find room."""
        bounds = [list(view.bounds) for view in sequences]
        if self.schedule is None or not limits.tiers:
            return bounds
        spare = _spare(sequences, bounds, limits)
        for view, ends in zip(sequences, bounds, strict=True):
            movable = view.length - view.window if view.active else view.length
            offloaded = min(self.schedule.offloaded(view), movable, _deepest(view, ends[0], spare))
            if offloaded >= ends[0] + self.chunk:
                spare -= _kept(view, offloaded) - _kept(view, ends[0])
                ends[0] = offloaded
            deleted = min(self.schedule.deleted(view), ends[0], view.rebuildable)
            if deleted >= ends[-1] + self.chunk:
                ends[1:] = [max(bound, deleted) for bound in ends[1:]]
        return bounds

    def _relieve_device(self, sequences: Sequence[SeqView], bounds: list[list[int]], limits: Limits) -> bool:
        """Push the oldest tokens down until the others, and a hot cache for the pushed ones, fit the pool."""
        if limits.tiers:
            for hot_factor, keeps_window in _DEMANDS:
                self._push(sequences, bounds, limits, hot_factor, keeps_window=keeps_window)
        # The hot cache may be smaller than one layer's selection, even nothing: that is then read in pieces.
        resident = sum(view.length - ends[0] for view, ends in zip(sequences, bounds, strict=True))
        return resident <= limits.device_tokens

    def _push(
        self,
        sequences: Sequence[SeqView],
        bounds: list[list[int]],
        limits: Limits,
        hot_factor: int,
        *,
        keeps_window: bool,
    ) -> None:
        """Lower the first bounds, the sequences that hold most on the device first, until the demand fits the pool.

        The demand of a sequence of length n with d tokens below is n - d + min(d, hot_factor * older). Nothing is
        offloaded that the tiers below cannot take: for a larger hot cache no sequence has to be preempted.
        """
        spare = _spare(sequences, bounds, limits)
        excess = -limits.device_tokens
        for view, ends in zip(sequences, bounds, strict=True):
            hot = hot_factor * view.older if view.active else 0
            excess += view.length - ends[0] + min(ends[0], hot)
        for index in sorted(range(len(sequences)), key=lambda i: bounds[i][0] - sequences[i].length):
            if excess <= 0:
                return
            view, ends = sequences[index], bounds[index]
            hot = hot_factor * view.older if view.active else 0
            most = view.length
            if view.active:
                most -= view.window if keeps_window else view.num_new
            wanted = -(-(max(ends[0], hot) + excess) // self.chunk) * self.chunk
            below = max(ends[0], min(wanted, most, _deepest(view, ends[0], spare)))
            spare -= _kept(view, below) - _kept(view, ends[0])
            excess -= below - ends[0] - (min(below, hot) - min(ends[0], hot))
            ends[0] = below

    @staticmethod
    def _relieve_tiers(sequences: Sequence[SeqView], bounds: list[list[int]], limits: Limits) -> bool:
        """Pass what a tier cannot hold to the next, the sequences that hold most first; the last tier deletes."""
        for level, tier in enumerate(limits.tiers):
            excess = sum(ends[level] - ends[level + 1] for ends in bounds) - tier.num_tokens
            order = sorted(range(len(sequences)), key=lambda i: bounds[i][level] - bounds[i][level + 1], reverse=True)
            # What may be deleted goes first: the tiers further down may have no room for anything else.
            excess -= _pass_down(bounds, level, excess, [(i, sequences[i].rebuildable) for i in order])
            if level + 1 < len(limits.tiers):
                excess -= _pass_down(bounds, level, excess, [(i, sequences[i].length) for i in order])
            if excess > 0:
                return False
        return True


def all_on_device(sequences: Sequence[SeqView], limits: Limits) -> bool:
    """Whether nothing has left the device, and nothing has to."""
    total = 0
    for view in sequences:
        if view.bounds[0]:
            return False
        total += view.length
    return total <= limits.device_tokens


def _pass_down(bounds: list[list[int]], level: int, count: int, order: Sequence[tuple[int, int]]) -> int:
    """Lower bounds so that up to `count` tokens leave a level, and say how many did.

    `order` has the sequences, and how far each may go.
    """
    left = count
    for index, most in order:
        ends = bounds[index]
        passed = max(min(left, min(ends[level], most) - ends[level + 1]), 0)
        ends[level + 1] += passed
        left -= passed
    return count - left


def _kept(view: SeqView, bound: int) -> int:
    """Tokens that take room below when all before `bound` have left the device and as many as may be are deleted."""
    return max(bound - view.rebuildable, 0)


def _spare(sequences: Sequence[SeqView], bounds: Sequence[Sequence[int]], limits: Limits) -> int:
    """Tokens that the tiers below can still take, not counting those that can be deleted."""
    kept = sum(_kept(view, ends[0]) for view, ends in zip(sequences, bounds, strict=True))
    return sum(tier.num_tokens for tier in limits.tiers) - kept


def _deepest(view: SeqView, bound: int, spare: int) -> int:
    """How far a first bound can move from here with that much room in the tiers below."""
    return max(bound, view.rebuildable) + spare
