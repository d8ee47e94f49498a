"""`alisa generate --ray`: a file of prompts, many engines, one file of results that holds every prompt once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Self

from rich.table import Table

from alisa.cli.files import STANDARD_INPUT, to_json
from alisa.cli.job_directory import JobDirectory, JobFacts
from alisa.cli.merge import Merged, merge_shards, remove_shards
from alisa.cli.screen import error_console, say, texts_bar
from alisa.cli.shard_work import GenerateWork
from alisa.cli.shards import Shard, ShardedInput, cut_input
from alisa.cli.signals import stop_on_sigterm, stop_status
from alisa.config import format_bytes
from alisa.dist.cluster import cluster
from alisa.dist.extra import load_ray
from alisa.dist.fleet import Fleet, ReplicaReport
from alisa.dist.share import with_whole_paths
from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.cli.generate import Generate
    from alisa.cli.job import ChatFrame


def run_fleet(args: Generate, frame: ChatFrame | None, make_work: Callable[..., GenerateWork] = GenerateWork) -> int:
    """Every prompt of the input has one result in the directory; returns the exit status.

    Args:
        args: the command.
        frame: what goes to a chat model's template beside the prompts.
        make_work: from the options to what a replica does; tests have one that dies.

    Raises:
        AlisaError: something the caller can mend; results finished until then are kept.
    """
    source, output = _needed_files(args)
    load_ray()  # to miss it after all prompts have been read would be late
    run = args.digest(frame)
    prompts = cut_input(
        source,
        shard_size=args.fleet.shard_size,
        n=args.sampling.n,
        limit=args.files.limit,
        keep_invalid=args.files.skip_invalid,
    )
    work = make_work(
        engine=with_whole_paths(args.engine),
        sampling=args.sampling,
        takes_own_sampling=args.takes_own_sampling,
        chat=frame,
        skip_invalid=args.files.skip_invalid,
        run=run,
        directory=output.absolute(),
    )
    facts = JobFacts(run, prompts.fingerprint, prompts.num_texts, args.fleet.shard_size)
    with JobDirectory(output, prompts, facts, args.fleet.max_deaths) as directory:
        if directory.results.exists():
            remove_shards(output)  # where the last run could not
            say(f"All {prompts.num_texts} texts are already in {directory.results}; nothing was left to do.")
            return 0
        started = perf_counter()
        try:
            reports = work_on(directory, work, args, prompts)
            merged = _merge(directory, prompts)
        except KeyboardInterrupt as stop:
            say(
                f"interrupted: {directory.num_finished()} of {prompts.num_texts} texts are in {output}; run the same "
                "command again to go on."
            )
            return stop_status(stop)
        if not args.display.quiet:
            error_console().print(report_table(reports))
            seconds = perf_counter() - started
            tokens = sum(report.num_tokens for report in reports)
            say(f"{merged.num_results} texts are in {directory.results}; {tokens} tokens in {seconds:.1f} s.")
        if merged.num_errors:
            say(f"{merged.num_errors} of {merged.num_results} have an error; first: {merged.first_error}")
        if args.display.json:
            _print_record(run, directory, merged, reports)
    return 0


def work_on(
    directory: JobDirectory, work: GenerateWork, args: Generate, prompts: ShardedInput
) -> tuple[ReplicaReport, ...]:
    """All shards are whole.

    Raises:
        InputError: there is no such cluster or no room in it, the work cannot be done as it is, or texts ended in an
            error of the engine.
    """
    waiting = directory.waiting
    if not waiting:
        return ()
    # Ray has messages of its own until it is left, and standard output is for results.
    with redirect_stdout(sys.stderr), cluster(str(args.fleet.ray)):
        stop_on_sigterm()  # Ray has put a handler of its own there
        size = args.fleet.size(args.engine.device)
        show = sys.stderr.isatty() and not args.display.quiet
        with (
            FleetScreen(prompts.num_texts, directory.num_finished(), size.num_replicas, show=show) as screen,
            Fleet(work, size, screen) as fleet,
        ):
            fleet.run(directory, waiting)
            reports = fleet.reports
    failed = [count for count in directory.counts.values() if count.num_failed]
    if failed:
        raise InputError(
            f"{sum(count.num_failed for count in failed)} of {prompts.num_texts} texts ended in an error "
            f"({failed[0].problem}); the others are finished. Run the same command again to try these again."
        )
    return reports


class FleetScreen:
    """A bar of finished texts where standard error is a terminal; deaths are told in any case.

    Args:
        total: texts of the job.
        already: those that an earlier run finished.
        num_replicas: engines.
        show: whether there is a bar.
    """

    def __init__(self, total: int, already: int, num_replicas: int, *, show: bool) -> None:
        self._already = already
        self._num_replicas = num_replicas
        self._started: float | None = None
        self._bar = texts_bar(show=show, redirects=True)  # Ray has messages of its own
        self._task = self._bar.add_task("starting", total=total, completed=already, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, reports: Sequence[ReplicaReport], num_ready: int) -> None:
        """Show what is finished."""
        if num_ready and self._started is None:
            self._started = perf_counter()
        tokens = sum(report.num_tokens for report in reports)
        elapsed = 0.0 if self._started is None else perf_counter() - self._started
        self._bar.update(
            self._task,
            description=f"{num_ready} of {self._num_replicas} replicas",
            completed=self._already + sum(report.num_texts for report in reports),
            rate=f"{tokens / elapsed:.1f} tok/s" if elapsed and tokens else "",
        )

    def told(self, message: str) -> None:
        """One line."""
        say(message)


def report_table(reports: Sequence[ReplicaReport]) -> Table:
    """One line for each replica."""
    table = Table(title="Replicas", title_justify="left")
    for name in ("replica", "machine", "shards", "texts", "tokens", "tok/s", "peak memory", "deaths"):
        table.add_column(name, justify="left" if name in ("replica", "machine") else "right")
    for report in reports:
        rate = f"{report.num_tokens / report.seconds:.1f}" if report.seconds else "-"
        table.add_row(
            report.name,
            report.host,
            *(str(count) for count in (report.num_shards, report.num_texts, report.num_tokens)),
            rate,
            format_bytes(report.peak_rss_bytes),
            str(report.num_deaths),
        )
    return table


def _needed_files(args: Generate) -> tuple[Path, Path]:
    """The input and the output.

    Raises:
        InputError: one is missing, or an option is of one engine.
    """
    files = args.files
    if args.prompts or files.input is None or files.output is None or files.input == STANDARD_INPUT:
        raise InputError(
            "--ray works on a file: give --input FILE.jsonl and --output DIR, and no prompts as arguments."
        )
    of_one = {"--report": files.report is not None, "--verify": args.verify, "--shard": files.shard is not None}
    if given := [name for name, is_given in of_one.items() if is_given]:
        raise InputError(f"{given[0]} is of one engine, and --ray has several; leave one of the two out.")
    if files.output.exists() and not files.output.is_dir():
        raise InputError(f"--output {files.output} is a file; with --ray it is a directory.")
    return files.input, files.output


def _merge(directory: JobDirectory, prompts: ShardedInput) -> Merged:
    def files() -> Iterator[tuple[Shard, Path]]:
        for shard in prompts.shards:
            yield shard, directory.files(shard.number).whole

    merged = merge_shards(files(), directory.results)
    remove_shards(directory.path)
    return merged


def _print_record(run: str, directory: JobDirectory, merged: Merged, reports: Sequence[ReplicaReport]) -> None:
    record = {
        "command": "generate",
        "complete": True,
        "run": run,
        "output": str(directory.results),
        **asdict(merged),
        "replicas": [asdict(report) for report in reports],
    }
    sys.stdout.write(to_json(record) + "\n")
    sys.stdout.flush()
