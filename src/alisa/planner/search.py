"""The schedule with the least time: a coarse grid over the paper's four numbers, then refinement around the best.

ALISA (section 5.3) minimises the sum of compute, movement and recomputation over p1, p2, alpha and beta by a greedy
search over an offline profile. Here every candidate is priced by rolling it out, through the same scheduler that the
engine will ask; the caps decide what is possible, and pressure moves what a schedule forgot. Batch size and row format
are chosen first, with the schedule that only pressure makes, because they decide whether anything has to move at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from alisa.planner.cost import CostModel
from alisa.planner.draft_pricer import DraftPricer
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig
from alisa.planner.simulate import MemoryBudget, Timeline, UniformWorkload, room_for, simulate_uniform
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, PlacementPolicy, fresh_view, is_oversubscribed
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase
from alisa.spec import ModelSpec

_PRICED_STEPS = 48
"""Steps of a rollout that a search prices; the others are taken to cost as much as their neighbours."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Values that are tried."""

    offload_from: tuple[int, ...]
    recompute_from: tuple[int, ...]
    offload_ratio: tuple[float, ...]
    recompute_ratio: tuple[float, ...]

    def schedules(self) -> Iterator[Schedule]:
        """Every different legal combination: where nothing is deleted, it does not matter when that begins."""
        for start, ratio in product(self.offload_from, self.offload_ratio):
            seen = False
            for later, deleted in product(self.recompute_from, self.recompute_ratio):
                if deleted == 0:
                    if not seen:
                        yield _schedule(start, start, ratio, 0.0)
                    seen = True
                elif later >= start:
                    yield _schedule(start, later, ratio, deleted)


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """A way to run a workload, and what it is expected to cost."""

    workload: UniformWorkload
    """Of one wave: `batch` sequences run together."""
    waves: int
    method: RunConfig
    placement: PlacementPolicy
    limits: Limits
    room: MemoryBudget
    timeline: Timeline

    def seconds(self, *, overlap: bool) -> float:
        """Of the whole work."""
        total = self.timeline.total()
        return self.waves * (total.overlapped_s if overlap else total.serial_s)

    def tokens_per_s(self, *, overlap: bool, num_tokens: int) -> float:
        """Generated tokens for each second, prompts included in the time, as the paper counts."""
        return num_tokens / self.seconds(overlap=overlap)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found."""

    best: PlanCandidate
    num_priced: int
    notes: tuple[str, ...]
    """Why it is so, one sentence each."""


def search(
    spec: ModelSpec,
    workload: UniformWorkload,
    hardware: Hardware,
    methods: Iterable[RunConfig],
    *,
    room: MemoryBudget | None = None,
    overlap: bool = True,
    grid: Grid | None = None,
    placement: PlacementPolicy | None = None,
    max_num_seqs: int | None = None,
) -> SearchResult | None:
    """The cheapest way to do the work; None when nothing fits.

    Args:
        spec: the model.
        workload: all of the work; fewer sequences may run together than it has.
        hardware: where.
        methods: ways to run the model among which it is free to choose, such as row formats.
        room: bytes for rows; None: all that the machine has.
        overlap: whether what can be hidden counts (False: the paper's sum).
        grid: schedules to try; None: a coarse grid, then refinement.
        placement: the only schedule to price; None: whichever is best.
        max_num_seqs: sequences that may run together; None: as many as is best.
    """
    pricer = _Pricer(spec, hardware, overlap, room)
    starts = [
        found
        for method in methods
        for batch in _batches(workload.batch, max_num_seqs or workload.batch)
        for simple in (_SIMPLEST if placement is None else (placement,))
        if (found := pricer.price(workload, batch, method, simple)) is not None
    ]
    if not starts:
        return None
    best = min(starts, key=pricer.rank)
    if placement is not None:
        return SearchResult(best, pricer.num_priced, ("The schedule is the one that was given.",))
    if best.timeline.loads[-1].below_tokens + best.timeline.loads[-1].deleted_tokens == 0:
        return SearchResult(best, pricer.num_priced, ("Everything fits on the device: nothing has to move.",))
    tried = [best]
    for schedule in (grid or _coarse(best, workload)).schedules():
        found = pricer.price(workload, best.workload.batch, best.method, ThreePhase(schedule))
        tried += [] if found is None else [found]
    best = min(tried, key=pricer.rank)
    if grid is None:
        best = _refined(best, workload, pricer, tried)
    return SearchResult(best, pricer.num_priced, tuple(_notes(best, tried, pricer)))


def _schedule(start: int, later: int, ratio: float, deleted: float) -> Schedule:
    return Schedule(offload_from=start, recompute_from=later, offload_ratio=ratio, recompute_ratio=deleted)


_SIMPLEST: tuple[PlacementPolicy, ...] = (AllDevice(), ThreePhase())
"""Without a schedule, pressure moves and deletes what must be."""


class _Pricer:
    """Prices candidates and counts them."""

    def __init__(self, spec: ModelSpec, hardware: Hardware, overlap: bool, room: MemoryBudget | None) -> None:
        self._spec = spec
        self._hardware = hardware
        self._overlap = overlap
        self._room = room
        self._models: dict[RunConfig, tuple[CostModel, DraftPricer | None]] = {}
        self.num_priced = 0

    def seconds(self, candidate: PlanCandidate) -> float:
        """What is minimised."""
        return candidate.seconds(overlap=self._overlap)

    def rank(self, candidate: PlanCandidate) -> tuple[float, float]:
        """Less is better: time to a microsecond, then what has to move while the arithmetic runs."""
        return round(self.seconds(candidate), 6), candidate.seconds(overlap=False)

    def price(
        self, workload: UniformWorkload, batch: int, method: RunConfig, placement: PlacementPolicy
    ) -> PlanCandidate | None:
        """This way to do the work; None when it does not fit."""
        wave = replace(workload, batch=batch)
        room = self._room or room_for(self._spec, method, self._hardware, wave)
        limits = room.limits(self._spec, method, placement, wave)
        if limits.device_tokens < batch or _oversubscribed(placement, limits, method, wave):
            return None
        stride = max(1, workload.output_len // _PRICED_STEPS)
        cost, drafts = self._models_of(method)
        timeline = simulate_uniform(cost, method, placement, limits, wave, stride=stride, drafts=drafts)
        self.num_priced += 1
        if timeline is None:
            return None
        return PlanCandidate(wave, -(-workload.batch // batch), method, placement, limits, room, timeline)

    def _models_of(self, method: RunConfig) -> tuple[CostModel, DraftPricer | None]:
        """Of the same method each time the same, for they remember prices."""
        if method not in self._models:
            drafts = None
            if method.drafts is not None:
                drafts = DraftPricer(self._spec, method, self._hardware, method.drafts, overlap=self._overlap)
            self._models[method] = CostModel(self._spec, method, self._hardware), drafts
        return self._models[method]


def _oversubscribed(placement: PlacementPolicy, limits: Limits, method: RunConfig, wave: UniformWorkload) -> bool:
    """Whether the engine would take sequences out of the batch before it ends."""
    if wave.batch == 1:
        return False
    view = fresh_view(wave.num_rows, limits, method.reads)
    return is_oversubscribed(placement, limits, [view.num_read] * wave.batch)


def _batches(most: int, together: int) -> list[int]:
    """How many sequences may run together: as many as there are, or may, and fewer for as many more waves."""
    waves = sorted({1, 2, 3, 4, 6, 8, 12, 16, 32, 64, most})
    return sorted({min(-(-most // count), together) for count in waves if count <= most}, reverse=True)


def _coarse(best: PlanCandidate, workload: UniformWorkload) -> Grid:
    """The first step at which the device is full, by and by earlier; ratios in fifths."""
    full = max(best.limits.device_tokens // best.workload.batch - workload.prompt_len, 0)
    last = workload.output_len
    starts = sorted({0, min(full, last) // 2, min(full, last), last})
    return Grid(
        offload_from=tuple(starts),
        recompute_from=tuple(sorted({*starts, (min(full, last) + last) // 2})),
        offload_ratio=(0.2, 0.4, 0.6, 0.8, 1.0),
        recompute_ratio=(0.0, 0.5, 1.0),
    )


def _refined(
    best: PlanCandidate, workload: UniformWorkload, pricer: _Pricer, tried: list[PlanCandidate]
) -> PlanCandidate:
    """Each number in turn a little up and down, by less and less, while that helps."""
    steps, ratio = max(workload.output_len // 8, 1), 0.1
    while ratio > 0.02:
        better = best
        for schedule in _neighbours(best, steps, ratio, workload.output_len):
            found = pricer.price(workload, best.workload.batch, best.method, ThreePhase(schedule))
            if found is not None:
                tried.append(found)
                better = min(better, found, key=pricer.rank)
        if better is best:
            steps, ratio = max(steps // 2, 1), ratio / 2
        best = better
    return best


def _neighbours(best: PlanCandidate, steps: int, ratio: float, last: int) -> Iterator[Schedule]:
    placement = best.placement
    if not isinstance(placement, ThreePhase) or placement.schedule is None:
        return
    now = placement.schedule
    for sign in (-1, 1):
        start = min(max(now.offload_from + sign * steps, 0), last)
        later = min(max(now.recompute_from + sign * steps, now.offload_from), last)
        share = round(min(max(now.offload_ratio + sign * ratio, 0.0), 1.0), 3)
        gone = round(min(max(now.recompute_ratio + sign * ratio, 0.0), 1.0), 3)
        yield _schedule(start, max(now.recompute_from, start), now.offload_ratio, now.recompute_ratio)
        yield _schedule(now.offload_from, now.recompute_from, share, now.recompute_ratio)
        if now.recompute_ratio:
            yield _schedule(now.offload_from, later, now.offload_ratio, now.recompute_ratio)
        yield _schedule(now.offload_from, now.recompute_from, now.offload_ratio, gone)


def _notes(best: PlanCandidate, tried: list[PlanCandidate], pricer: _Pricer) -> Iterator[str]:
    if best.waves > 1:
        yield (
            f"{best.workload.batch} sequences run together, in {best.waves} waves: more would read more than the "
            "device holds, or not fit."
        )
    if best.timeline.loads[-1].below_tokens + best.timeline.loads[-1].deleted_tokens == 0:
        return
    deleting = [found for found in tried if found.timeline.loads[-1].deleted_tokens]
    if best.timeline.loads[-1].deleted_tokens:
        yield "The oldest tokens are deleted: computing them again is cheaper than keeping them below."
    elif deleting:
        other = min(deleting, key=pricer.seconds)
        more = pricer.seconds(other) - pricer.seconds(best)
        yield (
            f"Nothing is deleted (beta = 0): the best schedule that deletes takes {more:.2g} s more, because every "
            "token that may be deleted must first be kept as a layer input, and what is read again must be computed."
        )
    else:
        yield "Nothing is deleted (beta = 0): no schedule that deletes fits."
