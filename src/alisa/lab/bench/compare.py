"""Records of `alisa bench run` side by side: medians over the rounds, ratios, and what these mean. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from alisa.errors import InputError
from alisa.lab.bench.others import QUIET_SHARE
from alisa.records.jsonl import LineFormat, Record, read_records
from alisa.records.schema import Floor, RunRecord
from alisa.records.structure import structure_record


def _complaint(line: Record) -> str | None:
    try:
        structure_record(RunRecord, line)
    except InputError as error:
        return f"not a record of alisa bench run ({error})"
    return None


RUN_LINES = LineFormat(what="a record of alisa bench run", first="kind", key="cell", complaint=_complaint)


def read_runs(path: Path) -> list[RunRecord]:
    """The records of a file, the newest of equals.

    Raises:
        InputError: it cannot be read, or is not what alisa bench run writes.
    """
    records = [structure_record(RunRecord, line) for line in read_records(path, RUN_LINES)]
    return list({record.cell: record for record in records}.values())


@dataclass(frozen=True, slots=True)
class RunSeries:
    """One engine on one workload, over all rounds."""

    run: str
    workload: str
    records: tuple[RunRecord, ...]

    @property
    def ran(self) -> list[RunRecord]:
        """Records with figures."""
        return [record for record in self.records if record.figures is not None]

    @property
    def reason(self) -> str | None:
        """Why there are none; None: there are."""
        last = self.records[-1]
        return None if self.ran else f"{last.status}: {last.reason}"

    def values(self, figure: str) -> list[float]:
        """A figure of every round that has it."""
        values = [getattr(record.figures, figure) for record in self.ran]
        return [value for value in values if value is not None]

    def median(self, figure: str) -> float | None:
        """Its median; None where no round has it."""
        values = self.values(figure)
        return median(values) if values else None

    @property
    def floor_share(self) -> float | None:
        """Seconds of the floor over those that were taken, for the whole run; the median."""
        shares = [
            record.floor.wall_s / record.figures.wall_s
            for record in self.records
            if record.floor is not None and record.figures is not None
        ]
        return median(shares) if shares else None

    @property
    def others_share(self) -> float | None:
        """The largest share of the processors that others took during a round; None where it was not watched."""
        shares = [record.others_share for record in self.ran if record.others_share is not None]
        return max(shares) if shares else None

    @property
    def disturbed(self) -> bool:
        """Whether that was too much."""
        return (self.others_share or 0.0) > QUIET_SHARE


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one line is as another, and whether the difference is more than chance."""

    value: float
    certain: bool | None
    """True: every round of one is faster than every round of the other. None: there are fewer than three of each."""


LEAST_ROUNDS = 3
"""Of each, so that no overlap says something: by chance alone it comes in one of ten cases (2 of 20 orders)."""


def with_best_floors(records: Iterable[RunRecord]) -> list[RunRecord]:
    """The same with every floor priced by the fastest that its machine was seen to be on its workload.

    What slows a machine down for a while must not lower the floor of a run that came before or after.
    """
    found = list(records)
    best: dict[tuple[tuple[str, str], int], tuple[float, float]] = {}
    speeds: dict[tuple[str, str], float] = {}
    for name, floor in ((_place(record), record.floor) for record in found):
        if floor is not None:
            key = _same_work(name, floor)
            gemm_s, prefill_s = best.get(key, (float("inf"),) * 2)
            best[key] = min(gemm_s, floor.gemm_s or gemm_s), min(prefill_s, floor.prefill_s)
            speeds[name] = max(speeds.get(name, 0.0), floor.read_bytes_per_s)

    def priced(name: tuple[str, str], floor: Floor) -> Floor:
        return _priced(floor, speeds[name], *best[_same_work(name, floor)])

    return [
        record if record.floor is None else replace(record, floor=priced(_place(record), record.floor))
        for record in found
    ]


def _place(record: RunRecord) -> tuple[str, str]:
    """Workload and processor."""
    return record.workload.name, record.stamp.cpu


def _same_work(workload: tuple[str, str], floor: Floor) -> tuple[tuple[str, str], int]:
    """Workload and processor, and megabytes of weights that are read: as many steps with weights of one format."""
    return workload, round(floor.weights_s * floor.read_bytes_per_s / 1e6)


def _priced(floor: Floor, read_bytes_per_s: float, gemm_s: float, prefill_s: float) -> Floor:
    slower = floor.read_bytes_per_s / read_bytes_per_s
    return Floor(
        weights_s=floor.weights_s * slower,
        rows_s=floor.rows_s * slower,
        gemm_s=None if floor.gemm_s is None else gemm_s,
        prefill_s=prefill_s,
        read_bytes_per_s=read_bytes_per_s,
    )


def series_of(records: Iterable[RunRecord]) -> dict[str, list[RunSeries]]:
    """Lines by workload, both in the order in which they first appear."""
    groups: dict[str, dict[str, list[RunRecord]]] = {}
    for record in with_best_floors(records):
        runs = groups.setdefault(record.workload.name, {})
        runs.setdefault(record.run, []).append(record)
    return {
        workload: [RunSeries(run, workload, tuple(found)) for run, found in runs.items()]
        for workload, runs in groups.items()
    }


def ratio(line: RunSeries, base: RunSeries, figure: str = "tokens_per_s") -> Ratio | None:
    """How the first compares with the second; None where one has no such figure."""
    ours, theirs = line.values(figure), base.values(figure)
    if not ours or not theirs:
        return None
    value = median(ours) / median(theirs)
    if min(len(ours), len(theirs)) < LEAST_ROUNDS:
        return Ratio(value, None)
    return Ratio(value, min(ours) > max(theirs) or max(ours) < min(theirs))


def pairs(
    first: Sequence[RunRecord], second: Sequence[RunRecord] | None
) -> dict[str, list[tuple[RunSeries, RunSeries | None]]]:
    """By workload, every line and what it is compared with.

    That is the same run in the second file or, with one file, the workload's first run that has figures.
    """
    groups = series_of(first)
    if second is None:
        bases = {name: next((line for line in lines if line.ran), None) for name, lines in groups.items()}
        return {name: [(line, bases[name]) for line in lines] for name, lines in groups.items()}
    others = {(line.workload, line.run): line for lines in series_of(second).values() for line in lines}
    return {name: [(line, others.get((name, line.run))) for line in lines] for name, lines in groups.items()}
