"""`alisa bench ...`: measurements that end in one record, with the physical floor next to every figure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from rich.table import Table
from tyro.conf import arg

from alisa.cli.files import to_json
from alisa.cli.screen import output_console, say, waiting
from alisa.errors import InputError
from alisa.lab.bench.cases import CASES, DEFAULT_CASES
from alisa.lab.bench.others import QUIET_SHARE

if TYPE_CHECKING:
    from alisa.lab.bench.case import Outcome, Role

_EVERY = "all"


@dataclass(frozen=True, kw_only=True)
class BenchKernels:
    """Time the native CPU kernels against torch, and against the memory they must read.

    Every candidate of a case runs once in each round, so that a slow moment of the machine meets all of them; figures
    are medians, with the quartiles in brackets, and ratios are against the fastest way that torch has. GB/s count only
    what must be read and written. A case takes up to 4 GB of memory. For instance:
      alisa bench kernels
      alisa bench kernels --case bf16-20 int8-20 --isa avx2 --output kernels.jsonl
      alisa bench kernels --case all --only-kernel --runs 31
    """

    case: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help=f"What to measure: {_EVERY}, or some of {', '.join(CASES)}.")
    ] = DEFAULT_CASES
    runs: Annotated[int, arg(metavar="N")] = 9
    """Rounds that count, after two that do not."""
    isa: Literal["auto", "avx512_vnni", "avx512", "avx2", "portable"] = "auto"
    """Kernels for this instruction set; auto: the fastest that runs here."""
    only_kernel: bool = False
    """The kernel and the memory bandwidth, nothing else."""
    output: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint="")] = None
    """Append the record to this file."""
    json: bool = False
    """End standard output with the record on one line."""

    def __post_init__(self) -> None:
        if self.runs < 2:
            raise InputError(f"runs is {self.runs}, at least 2 are needed for a spread.")
        for name in self.case:
            if name not in CASES and name != _EVERY:
                near = get_close_matches(name, CASES, n=1)
                raise InputError(f"There is no case {name!r}; {f'did you mean {near[0]}' if near else 'see --help'}?")

    @property
    def names(self) -> tuple[str, ...]:
        """The cases to run, each once."""
        return tuple(CASES) if _EVERY in self.case else tuple(dict.fromkeys(self.case))

    def run(self) -> int:
        """Do it; returns the exit status."""
        from alisa.lab.bench.kernels import make_kernels, make_record, run_case
        from alisa.lab.bench.stamp import current_stamp

        kernels = make_kernels(None if self.isa == "auto" else self.isa)
        stamp = current_stamp()
        outcomes: dict[str, Outcome] = {}
        with _appending(self.output) if self.output else nullcontext() as file:
            for number, name in enumerate(self.names, 1):
                with waiting(f"{name}, case {number} of {len(self.names)}", show=sys.stderr.isatty()):
                    outcomes[name] = run_case(CASES[name], kernels, runs=self.runs, only_kernel=self.only_kernel)
            cases = {name: (CASES[name], outcome) for name, outcome in outcomes.items()}
            line = to_json(make_record(stamp, kernels.isa, self.runs, cases)) + "\n"
            if file:
                file.write(line)
        bandwidths = sorted(outcome.read_bytes_per_s for outcome in outcomes.values())
        output_console().print(
            f"{kernels.isa} kernels, {stamp.num_threads} threads, {stamp.cpu}, torch {stamp.torch}; memory is read at "
            f"{bandwidths[0] / 1e9:.1f} to {bandwidths[-1] / 1e9:.1f} GB/s"
        )
        output_console().print(kernels_table(outcomes))
        disturbed = [name for name, outcome in outcomes.items() if outcome.others_share > QUIET_SHARE]
        if disturbed:
            say(f"other programs were busy during {', '.join(disturbed)}: these figures are not to be relied on.")
        if self.json:
            sys.stdout.write(line)
        return 0


def _appending(path: Path) -> TextIO:
    """The file, opened before the work so that a wrong path costs nothing."""
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def kernels_table(outcomes: Mapping[str, Outcome]) -> Table:
    """One line for each case; of the rivals that were measured, how many times longer they take than the kernel."""
    from alisa.lab.bench.case import Role

    rivals = {
        Role.DENSE: "dense SDPA",
        Role.GATHER: "gather + SDPA",
        Role.PACKED: "torch bf16",
        Role.REFERENCE: "torch reference",
    }
    measured = {timing.role for outcome in outcomes.values() for timing in outcome.timings.values()}
    shown = [role for role in rivals if role in measured]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("milliseconds", no_wrap=True)
    for title in ("kernel", "(quartiles)", "GB/s", "of read", *(rivals[role] for role in shown)):
        table.add_column(title, justify="right", no_wrap=True)
    for name, outcome in outcomes.items():
        kernel = outcome.kernel
        table.add_row(
            name,
            _milliseconds(kernel.median_s),
            f"({_milliseconds(kernel.low_s)} {_milliseconds(kernel.high_s)})",
            f"{outcome.bytes_per_s / 1e9:.1f}",
            f"{outcome.bandwidth_share:.0%}",
            *(_rival(outcome, role) for role in shown),
        )
    return table


def _rival(outcome: Outcome, role: Role) -> str:
    """The best candidate in this role: its time, and the factor to the kernel's."""
    best, factor = outcome.fastest(role), outcome.speedup(role)
    return "-" if best is None or factor is None else f"{_milliseconds(best[1].median_s)} {factor:5.1f}x"


def _milliseconds(seconds: float) -> str:
    """Three digits or so: 0.072, 7.21, 14.0, 498."""
    value = seconds * 1e3
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"
