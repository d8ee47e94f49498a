"""What a run did, told three ways: lines for a person, a file of records, and one JSON record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.table import Table
from rich.text import Text

from alisa.cli.files import JsonLinesFile
from alisa.config import format_bytes
from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.config import EngineConfig, SamplingParams
    from alisa.engine.report import RunReport
    from alisa.lab.verify import VerifyReport
    from alisa.llm import LLM
    from alisa.outputs import RunSummary
    from alisa.planner.cost import StepCost

_TIME_PARTS = ("linear", "attention", "selection", "transfer", "sampling", "other")


def summary_lines(
    name: str, config: EngineConfig, summary: RunSummary, verified: VerifyReport | None
) -> Iterator[tuple[str, str]]:
    """Label and value of each line of the closing report."""
    yield "model", name
    policy = "dense" if config.policy == "dense" else f"{config.policy}, sparsity {config.sparsity:g}"
    yield "policy", f"dense, drafts by {policy}" if config.exact else policy
    yield (
        "prompts",
        f"{summary.num_requests}: {summary.prompt_tokens} tokens read, {summary.output_tokens} tokens written "
        f"in {summary.wall_s:.1f} s",
    )
    computed = max(summary.prompt_tokens - summary.cached_tokens, 0)
    prefill, decode = _rate(computed, summary.prefill_s), _rate(summary.decode_tokens, summary.decode_s)
    yield "speed", f"prefill {prefill}, decode {decode}"
    shares = [f"{part} {_share(getattr(summary, f'{part}_s'), summary.decode_s)}" for part in _TIME_PARTS]
    yield "decode", ", ".join(shares)
    yield "KV memory", f"{format_bytes(summary.kv_peak_bytes)} at the peak, cap {format_bytes(summary.kv_cap_bytes)}"
    if summary.prefix_cap_bytes:
        kept = f"{format_bytes(summary.prefix_peak_bytes)} at the peak, cap {format_bytes(summary.prefix_cap_bytes)}"
        yield "prefix cache", f"{summary.cached_tokens} prompt tokens were known; {kept}"
    if summary.disk_cap_bytes:
        yield from _tier_lines(summary)
    if summary.num_preempted:
        yield "preempted", f"{summary.num_preempted} times a prompt had to wait in the middle for room"
    if summary.drafted_tokens:
        each = summary.decode_tokens / summary.decode_sequences
        right = _share(summary.accepted_tokens, summary.drafted_tokens)
        yield "drafts", f"{right} of {summary.drafted_tokens} came true, {each:.2f} tokens of a text in each step"
    covered = "" if summary.covered is None else f"; by the sketch it has {summary.covered:.1%} of the weight"
    yield "KV read", f"{_share(summary.tokens_attended, summary.tokens_dense)} of what dense attention reads{covered}"
    if verified is not None:
        yield (
            "verified",
            f"{verified.top1_agreement:.1%} of {verified.num_tokens} next tokens as dense attention picks them, "
            f"mean KL {verified.mean_kl:.2g}, attention mass lost {verified.lost_mass:.1%} "
            f"({verified.num_requests} prompts)",
        )


def _tier_lines(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What went below the device, and what that cost."""
    traffic = summary.traffic
    disk = f"{format_bytes(summary.disk_peak_bytes)} at the peak, cap {format_bytes(summary.disk_cap_bytes)}"
    yield "on disk", disk
    steps = ", ".join(f"{count} {phase}" for phase, count in summary.phase_steps.items())
    yield "phases", f"decode steps: {steps}"
    rows = f"{traffic.stored_rows} offloaded, {traffic.fetched_rows} fetched back"
    if traffic.deleted_rows:
        rows += f", {traffic.deleted_rows} deleted, {traffic.rebuilt_rows} rebuilt"
    yield "rows moved", f"{rows} ({format_bytes(traffic.moved_bytes / max(summary.output_tokens, 1))} for each token)"
    yield (
        "hidden",
        f"{traffic.hidden_share:.0%} of the transfer time during arithmetic; {traffic.hit_rate:.1%} of the look-ups "
        "found their row on the device",
    )


def prediction_line(summary: RunSummary, predicted: StepCost | None) -> tuple[str, str]:
    """What the decode steps were expected to take, and what they took.

    Args:
        summary: of the run.
        predicted: None: this machine has no profile, or one that says nothing about such a run.
    """
    if predicted is None:
        return "predicted", "nothing; run `alisa profile` once for a prediction"
    parts = [
        f"{part} {getattr(predicted, f'{part}_s'):.2f} ({getattr(summary, f'{part}_s'):.2f})" for part in _TIME_PARTS
    ]
    total = f"decode {predicted.overlapped_s:.2f} s, measured {summary.decode_s:.2f}"
    return "predicted", f"{total}: {', '.join(parts)}"


def summary_table(lines: Iterator[tuple[str, str]]) -> Table:
    """The lines, aligned."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in lines:
        # Text, not str: a name such as [model] must not be read as markup.
        table.add_row(label, Text(value))
    return table


class ReportFile:
    """A file for the records of runs: opened before the work, so that a wrong path costs nothing, and continued.

    What earlier runs wrote stays; a command that was interrupted and its continuation are two runs of one file.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file at `path`.

        Raises:
            InputError: it holds something else, cannot be written, or another process writes to it.
        """
        self._lines = JsonLinesFile(
            path, line_start=b'{"kind": ', writer="record of alisa generate", way_out="choose another --report"
        )
        try:
            for place, record in self._lines.read():
                if "kind" not in record:
                    raise self._lines.refuse(place)
            self._lines.cut_torn_line()
        except BaseException:
            self._lines.close()
            raise

    def write(self, llm: LLM, sampling: SamplingParams, report: RunReport | None, *, complete: bool) -> None:
        """Append the run, its steps and its summary.

        Args:
            llm: the model that ran.
            sampling: what the prompts share.
            report: what it did; None when it did nothing.
            complete: whether it came to its end.

        Raises:
            InputError: the system refuses, for example because the disk is full.
        """
        try:
            for record in self._records(llm, sampling, report, complete=complete):
                self._lines.append(record)
        except OSError as error:
            raise InputError(
                f"{self._lines.path} cannot be written: {error.strerror}; the results are not affected."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    @staticmethod
    def _records(
        llm: LLM, sampling: SamplingParams, report: RunReport | None, *, complete: bool
    ) -> Iterator[Mapping[str, object]]:
        yield {"kind": "run", **llm.describe(), "sampling": asdict(sampling)}
        for record in () if report is None else report.records:
            yield {"kind": "step", **asdict(record)}
        yield {"kind": "summary", "complete": complete, **(asdict(report.summary) if report and complete else {})}


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds > 0 and tokens > 0 else "-"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"
