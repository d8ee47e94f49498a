"""`alisa bench run`, `compare` and `plot`: whole engines side by side on the same work."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from alisa.cli.files import refuse_same_file
from alisa.cli.prompts import read_prompts
from alisa.cli.screen import output_console, say
from alisa.cli.signals import stop_status
from alisa.errors import InputError
from alisa.lab.bench.others import QUIET_SHARE, wait_for_quiet

if TYPE_CHECKING:
    from alisa.lab.bench.compare import Ratio, RunSeries
    from alisa.lab.bench.experiment import Experiment, Workload
    from alisa.records.schema import RunRecord

_DONE = ("ran", "unavailable")
"""Statuses that --resume does not try again."""


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """Run an experiment: engines on the same workloads, one after the other, a JSON line for each measurement.

    An experiment is a TOML file; src/alisa/lab/bench/experiment.py shows how to write one, benchmarks/experiments has
    some. Every record carries the machine, the versions, the commit, how busy other programs were, and the floor: what
    reading the weights and rows and multiplying the matrices takes at least. Run it in the checkout, where the drivers
    and environments of other engines are (make peer-NAME). For instance:
      alisa bench run benchmarks/experiments/tiny.toml
      alisa bench run benchmarks/experiments/paper.toml --output paper.jsonl --only b16 vllm --resume
    """

    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.toml")]
    """The file that describes it."""
    output: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint="(default: standard output)")] = None
    """Append the records to this file."""
    only: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = ()
    """Only these runs and these workloads."""
    rounds: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as the experiment says)")] = None
    """How often each measurement is made, in turns; three or more tell a difference from chance."""
    resume: bool = False
    """Skip what --output has already; what failed, or was missing, is tried again."""
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the processors there are)")] = None
    """That every engine may use."""
    patience: Annotated[float, arg(metavar="SECONDS")] = 120.0
    """How long to wait for other programs to be quiet before each measurement; 0: not to look."""
    drivers: Path = Path("benchmarks/peers")
    """Scripts that drive other engines."""
    environments: Path = Path(".peers")
    """Their virtual environments."""
    models: Path = Path(".peers/models")
    """Where checkpoints with random weights are written."""

    def __post_init__(self) -> None:
        if self.resume and self.output is None:
            raise InputError("--resume needs the --output file of the run that it goes on with.")
        for name in ("threads", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} is {value}, at least 1 is needed.")

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.bench.experiment import load_experiment

        refuse_same_file({"The experiment": self.experiment, "--output": self.output})
        experiment = load_experiment(self.experiment)
        if self.rounds is not None:
            experiment = replace(experiment, rounds=self.rounds)
        wanted = experiment.measurements(self.only)
        try:
            return self._measure(experiment, {measurement.workload.name for measurement in wanted})
        except KeyboardInterrupt as stop:
            say("interrupted." + (" The same command with --resume goes on." if self.output else ""))
            return stop_status(stop)

    def _measure(self, experiment: Experiment, workloads: set[str]) -> int:
        from alisa.lab.bench.compare import RUN_LINES
        from alisa.lab.bench.suite import Places, measure, measure_floor, prepare_workload
        from alisa.machine import num_cpus
        from alisa.records.jsonl import JsonlFile

        places = Places(self.drivers, self.environments, self.models)
        threads = self.threads or max(1, int(num_cpus()))
        with JsonlFile(self.output, RUN_LINES, lock=True) as file:
            todo = [
                measurement
                for measurement in experiment.measurements(self.only)
                if not (self.resume and (known := file.get(measurement.cell)) and known["status"] in _DONE)
            ]
            texts = {w.name: _texts(w) for w in experiment.workloads if w.name in workloads}
            work, speeds = None, None
            for number, measurement in enumerate(todo, 1):
                workload = measurement.workload
                if work is None or work.workload != workload:
                    say(f"{workload.name}: model, prompts and floor")
                    work = prepare_workload(workload, texts[workload.name], places, threads)
                    self._wait()
                    speeds = measure_floor(work)
                assert speeds is not None, "measured with the work"
                self._wait()
                record, speeds = measure(measurement, work, speeds, places)
                file.append(record.line())
                if self.output is None:
                    _write_line(record)
                say(f"[{number}/{len(todo)}] {workload.name}, {measurement.run.name}: {_told(record)}")
        return 0

    def _wait(self) -> None:
        """The machine is quiet, or it has been said that it is not."""
        if self.patience > 0 and (busy := wait_for_quiet(self.patience)) > QUIET_SHARE:
            say(f"other programs take {busy:.0%} of the processors; measuring all the same")


def _texts(workload: Workload) -> tuple[str, ...] | None:
    """The workload's prompts, if a file has them."""
    if workload.prompts is None:
        return None
    path = os.path.expandvars(workload.prompts)
    if "$" in path:
        raise InputError(f"workload {workload.name!r} reads its prompts from {path}; set that environment variable.")
    texts = [prompt.text for prompt in read_prompts(Path(path))][: workload.num_prompts or workload.batch]
    if not texts:
        raise InputError(f"{path} holds no prompt.")
    return tuple(texts)


def _write_line(record: RunRecord) -> None:
    from alisa.records.jsonl import line_of

    sys.stdout.write(line_of(record.line()).decode())
    sys.stdout.flush()


def _told(record: RunRecord) -> str:
    """One measurement in a few words."""
    figures, floor, others = record.figures, record.floor, record.others_share or 0.0
    if figures is None or floor is None:
        return f"{record.status}: {record.reason}"
    busy = f", others took {others:.0%}" if others > QUIET_SHARE else ""
    return (
        f"{figures.tokens_per_s:.1f} tokens/s, {floor.wall_s / figures.wall_s:.0%} of the floor's, first token after "
        f"{figures.first_token_median_s:.2f} s, {figures.peak_rss_bytes / 2**30:.1f} GiB{busy}"
    )


@dataclass(frozen=True, kw_only=True)
class BenchCompare:
    """Compare records of alisa bench run: medians over the rounds, ratios, and whether these are more than chance.

    One file: every run against the first of its workload. Two files: every run of the first against the same in the
    second. A ratio is marked = where the rounds of both overlap, and ? where there are fewer than three of each.
    For instance:
      alisa bench compare paper.jsonl
      alisa bench compare after.jsonl before.jsonl
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="A.jsonl [B.jsonl]")]
    """What alisa bench run wrote."""

    def __post_init__(self) -> None:
        if len(self.files) not in (1, 2):
            raise InputError(f"{len(self.files)} files were given; give one, or two to compare.")

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.bench.compare import pairs, ratio, read_runs

        first, *others = [read_runs(path) for path in self.files]
        console = output_console()
        disturbed = False
        for workload, lines in pairs(first, others[0] if others else None).items():
            table = Table(title=workload, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
            table.add_column("", no_wrap=True)
            for title in ("tokens/s", "(rounds)", "decode", "first token", "peak GiB", "of floor", "ratio"):
                table.add_column(title, justify="right", no_wrap=True)
            for line, base in lines:
                if line.reason is not None:
                    table.add_row(line.run, *[""] * 7)
                    continue
                table.add_row(*_cells(line, None if base is None or base is line else ratio(line, base)))
                disturbed |= line.disturbed
            console.print(table)
            for line, _ in lines:
                if line.reason is not None:
                    console.print(Text(f"{line.run} {line.reason}"))
            console.print()
        if disturbed:
            say("* other programs were busy meanwhile: these figures are not to be relied on.")
        return 0


def _cells(line: RunSeries, against: Ratio | None) -> tuple[str, ...]:
    rates = line.values("tokens_per_s")
    first, peak, decode = (line.median(n) for n in ("first_token_median_s", "peak_rss_bytes", "decode_tokens_per_s"))
    floor = line.floor_share
    marks = {True: "", False: " =", None: " ?"}
    return (
        line.run + (" *" if line.disturbed else ""),
        f"{line.median('tokens_per_s'):.1f}",
        f"({min(rates):.1f} {max(rates):.1f})" if len(rates) > 1 else "",
        "" if decode is None else f"{decode:.1f}",
        "" if first is None else f"{first:.2f} s",
        "" if peak is None else f"{peak / 2**30:.1f}",
        "" if floor is None else f"{floor:.0%}",
        "" if against is None else f"{against.value:.2f}x{marks[against.certain]}",
    )


@dataclass(frozen=True, kw_only=True)
class BenchPlot:
    """Draw records of alisa bench run: tokens per second as bars, with the floor's above each.

    For instance:
      alisa bench plot paper.jsonl --output paper.svg
    """

    file: Annotated[Positional[Path], arg(metavar="FILE.jsonl")]
    """What alisa bench run wrote."""
    output: Annotated[Path | None, arg(metavar="FIG.svg|.png|.pdf", help_behavior_hint="(default: beside FILE)")] = None
    """Where the figure goes."""

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.bench.compare import read_runs
        from alisa.lab.plot.canvas import save
        from alisa.lab.plot.runs import draw_runs

        path = self.output or self.file.with_suffix(".svg")
        refuse_same_file({"The file of records": self.file, "the figure": path})
        records = [record for record in read_runs(self.file) if record.figures is not None]
        if not records:
            raise InputError(f"{self.file} has no run with figures.")
        save(draw_runs(records), path)
        sys.stdout.write(f"{path}\n")
        return 0
