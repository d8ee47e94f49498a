"""What a person sees while prompts are worked on: results on standard output, progress on standard error.

Standard output carries results only, so it can be piped; the bar is drawn only where standard error is a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from alisa.outputs import RequestOutput


class Screen(Protocol):
    """Follows one run; entered before its first event, left after its last, whatever happened in between."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show what was held back, and remove what is only of passing interest."""
        ...

    def grew(self, index: int, text: str) -> None:
        """Prompt `index` has more text."""
        ...

    def finished(self, index: int, prompt: str, output: RequestOutput) -> None:
        """Prompt `index` is complete."""
        ...

    def skipped(self, index: int, problem: str) -> None:
        """Prompt `index` cannot be used."""
        ...


def error_console() -> Console:
    """A console on standard error as it is now."""
    return Console(stderr=True, highlight=False)


def output_console() -> Console:
    """A console on standard output as it is now; where that is no terminal, wide enough for a table."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(message: str) -> None:
    """One plain line on standard error."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class LiveText:
    """The one prompt and its text on standard output, as it comes."""

    def __init__(self, prompt: str, separator: str) -> None:
        """Show `separator` between the prompt and its continuation."""
        self._head = prompt + separator

    def __enter__(self) -> Self:
        self._write(self._head)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A broken pipe must not be written to again.
        if not isinstance(error, OSError):
            self._write("\n")

    def grew(self, index: int, text: str) -> None:
        """Show more text."""
        self._write(text)

    def finished(self, index: int, prompt: str, output: RequestOutput) -> None:
        """Nothing: all of the text is on the screen."""

    def skipped(self, index: int, problem: str) -> None:
        """Nothing: the only prompt and its problem are told at the end."""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def texts_bar(*, show: bool, redirects: bool = False) -> Progress:
    """A bar of finished texts, with a field `rate`, where standard error is a terminal.

    `redirects`: whether what others write goes above it.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=error_console(),
        transient=True,
        redirect_stdout=redirects,
        redirect_stderr=redirects,
        disable=not show,
    )


class ResultList:
    """Many prompts: a progress bar while they run and, when asked, each result in the order of the prompts."""

    def __init__(self, *, total: int, already: int, show_bar: bool, print_results: bool, separator: str) -> None:
        """Prepare to show `total` prompts, of which `already` were finished by an earlier run."""
        self._total = total
        self._print_results = print_results
        self._separator = separator
        self._waiting: dict[int, str] = {}
        self._next = 0
        self._finished_tokens = 0
        self._running_tokens: dict[int, int] = {}
        self._bar = texts_bar(show=show_bar)
        self._task = self._bar.add_task("prompts", total=total, completed=already, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if not isinstance(error, OSError):
            for index in sorted(self._waiting):
                sys.stdout.write(self._waiting[index])
            sys.stdout.flush()

    def grew(self, index: int, text: str) -> None:
        """Count a token: text arrives about once per token."""
        self._running_tokens[index] = self._running_tokens.get(index, 0) + 1
        self._show_rate()

    def finished(self, index: int, prompt: str, output: RequestOutput) -> None:
        """Count the prompt, and print its result when all those before it are printed."""
        self._running_tokens.pop(index, None)
        self._finished_tokens += output.report.output_tokens
        self._bar.advance(self._task)
        self._show_rate()
        if self._print_results:
            num_tokens = output.report.output_tokens
            head = f"--- prompt {index + 1} of {self._total}: {num_tokens} tokens, {output.finish_reason}"
            self._waiting[index] = f"{head}\n{prompt}{self._separator}{output.text}\n\n"
            self._print_waiting()

    def skipped(self, index: int, problem: str) -> None:
        """Count the prompt, and print its problem in its place."""
        self._bar.advance(self._task)
        if self._print_results:
            self._waiting[index] = f"--- prompt {index + 1} of {self._total}: skipped\n{problem}\n\n"
            self._print_waiting()

    def _show_rate(self) -> None:
        elapsed = self._bar.tasks[self._task].elapsed
        tokens = self._finished_tokens + sum(self._running_tokens.values())
        self._bar.update(self._task, rate=f"{tokens / elapsed:.1f} tok/s" if elapsed else "")

    def _print_waiting(self) -> None:
        if self._next not in self._waiting:
            return
        # The bar and the results may share one terminal: take the bar away while a result is printed.
        self._bar.stop()
        while self._next in self._waiting:
            sys.stdout.write(self._waiting.pop(self._next))
            self._next += 1
        sys.stdout.flush()
        self._bar.start()


def waiting(what: str, *, show: bool) -> AbstractContextManager[object]:
    """A moving sign that `what` is going on, for work of unknown length."""
    return error_console().status(what) if show else nullcontext()


@contextmanager
def loading_bar(name: str, *, show: bool) -> Iterator[LoadingBar]:
    """A bar on standard error for the weights of `name`, gone when they are read."""
    with Progress(console=error_console(), transient=True, disable=not show) as progress:
        yield LoadingBar(progress, f"loading {escape(name)}")


class LoadingBar:
    """Called with the amount done and the total, as `LLM(progress=...)` wants it."""

    def __init__(self, progress: Progress, title: str) -> None:
        """Add a task called `title` to `progress`."""
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` is read."""
        self._progress.update(self._task, completed=done, total=total)
