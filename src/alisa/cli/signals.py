"""Exit statuses of commands that were stopped, and standard streams that are closed or fail."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

_SHELL_OFFSET = 128
"""Shells add the number of the signal to this."""


class Stopped(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is: what is finished is kept."""


def stop_status(error: KeyboardInterrupt) -> int:
    """The exit status after Ctrl-C (130) or SIGTERM (143)."""
    return _SHELL_OFFSET + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT)


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises `Stopped` in the main thread, unless it is ignored already."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _stop)


def mend_standard_streams() -> None:
    """Standard streams that are closed lead nowhere, and a character that one cannot show becomes its code.

    Messages never decide about the work: what standard error does not take is dropped. A closed descriptor would else
    be given to the next file that is opened, and foreign messages would end up there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = _Messages(open(2, "wb", buffering=0, closefd=False), write_through=True, errors="backslashreplace")  # noqa: SIM115


class _Messages(io.TextIOWrapper):
    """Standard error that drops what it cannot write."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
