"""Runs of the command in processes of their own, without the seconds in which each would import the same libraries.

A program that has imported them waits; for each run it forks, and the fork ends as any interpreter does. What closed
streams at the start of a process do cannot be tried so.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO

ROOT = Path(__file__).parents[2]


class Run:
    """A run of `alisa generate`, as far as a `subprocess.Popen` is used here; a status below 0 is a signal."""

    def __init__(self, answers: socket.socket, stdout: IO[str] | None, stderr: IO[str]) -> None:
        self._answers = answers.makefile("r")
        answers.close()
        self.pid = int(self._answers.readline())
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._close_streams()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        """Whether it has not ended; one that was stopped runs too."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
            self._answers.close()
        return self.returncode

    def finish(self) -> tuple[int, str, str]:
        """Exit status and all that is still to be read of the two streams."""
        err: list[str] = []
        reader = Thread(target=lambda: err.append(self.stderr.read()))
        reader.start()
        out = "" if self.stdout is None else self.stdout.read()
        reader.join()
        status = self.wait()
        self._close_streams()
        return status, out, err[0]

    def _close_streams(self) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()


class Forks:
    """The program that waits; `close` ends it."""

    def __init__(self) -> None:
        self._asks, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-m", "tests.cli.forks", str(theirs.fileno())]
        self._program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def close(self) -> None:
        self._asks.close()
        assert self._program.wait(60) == 0

    def start(
        self, *options: str, word_s: float = 0.0, stdout: int | None = None, file_bytes: int | None = None
    ) -> Run:
        """Start `alisa generate OPTIONS` with the model that needs no weights.

        Args:
            options: of the command.
            word_s: seconds that a word takes.
            stdout: a file; None: a pipe to the `Run`.
            file_bytes: the size beyond which no file grows.
        """
        answers, theirs = socket.socketpair()
        out, err = None if stdout is not None else os.pipe(), os.pipe()
        given = [theirs.fileno(), stdout if out is None else out[1], err[1]]
        ask = {"options": options, "word_s": word_s, "file_bytes": file_bytes}
        socket.send_fds(self._asks, [json.dumps(ask).encode() + b"\n"], given)
        theirs.close()
        for pipe in (out, err):
            if pipe is not None:
                os.close(pipe[1])
        return Run(answers, None if out is None else os.fdopen(out[0]), os.fdopen(err[0]))


def next_run(asks: socket.socket) -> bool:
    """Wait for the next run to ask for; True in its process, False in the one that waits, at the end."""
    while True:
        message, given, _, _ = socket.recv_fds(asks, 1 << 16, 3)
        if not message:
            return False
        if os.fork() == 0:
            break
        for number in given:
            os.close(number)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asks.close()
    answers = socket.socket(fileno=given[0])
    if run := os.fork():  # this process only tells how the other one ends
        for number in given[1:]:
            os.close(number)
        answers.sendall(f"{run}\n".encode())
        answers.sendall(f"{os.waitpid(run, 0)[1]}\n".encode())
        os._exit(0)
    answers.close()
    for stream, number in zip((1, 2), given[1:], strict=True):
        os.dup2(number, stream)
        os.close(number)
    # Those that there are were made for the files of this program.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115 - stays open
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    ask = json.loads(message)
    if ask["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ask["file_bytes"],) * 2)
    os.environ["FAKE_WORD_S"] = str(ask["word_s"])
    sys.argv = ["alisa", "generate", *ask["options"]]
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children inherit that it is ignored
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    import torch  # noqa: F401 - what a run imports late is here before it forks

    from alisa.cli.main import run
    from tests.cli.fake import FakeGenerate

    if next_run(socket.socket(fileno=int(sys.argv[1]))):
        run({"generate": FakeGenerate})
