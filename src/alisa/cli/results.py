"""The file of results: one JSON line per finished request, written as it finishes, continued by the next run.

    {"index": 0, "prompt": "...", "text": "...", "token_ids": [...], "finish_reason": "eos", ..., "run": "..."}

`run` is a digest of the settings that decide the tokens. A later run continues a file only when every line carries its
own digest and its own prompts, so that no file ever mixes two kinds of results.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.outputs import RequestOutput

# Every line begins with this, which tells a torn line of ours from the end of somebody's own file.
_LINE_START = b'{"index": '


def settings_digest(settings: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits that two runs share exactly when all their settings are equal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def result_record(index: int, prompt: str, output: RequestOutput, run: str) -> dict[str, object]:
    """One finished request as plain JSON values."""
    measured = asdict(output.report)
    timings = {name: round(value, 6) for name, value in measured.items() if name.endswith("_s")}
    counts = {name: value for name, value in measured.items() if not name.endswith("_s")}
    return {
        "index": index,
        "prompt": prompt,
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "timings": timings,
        **counts,
        "run": run,
    }


class ResultFile:
    """An open file of results that knows which prompts it already holds.

    A failed `append` leaves all earlier lines intact and at most one torn line, which the next run cuts off.
    """

    def __init__(self, path: Path, prompts: Sequence[str], run: str) -> None:
        """Open `path` for appending, after checking that what is in it belongs to this run.

        Raises:
            InputError: the file holds something else, or cannot be written; it is left as it was.
        """
        self._path = path
        self._total = len(prompts)
        self._finished: set[int] = set()
        try:
            # A device such as /dev/full or a pipe has no past to continue.
            if path.is_file():
                self._finished = _finished_indices(path, prompts, run)
            # Unbuffered: a line is with the system when `append` returns, and closing cannot fail a second time.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the prompts whose results are in the file."""
        return frozenset(self._finished)

    def append(self, index: int, record: Mapping[str, object]) -> None:
        """Write one result.

        Raises:
            InputError: the system refuses, for example because the disk is full.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written: {error.strerror}; {len(self._finished)} of {self._total} prompts are "
                "in it. Make room and run the same command again to go on."
            ) from error
        self._finished.add(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _finished_indices(path: Path, prompts: Sequence[str], run: str) -> set[int]:
    """Check every line of an earlier run, then cut off a torn last one."""
    way_out = "choose another --output, or delete the file to start again"
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    finished: set[int] = set()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
            index, prompt, line_run = record["index"], record["prompt"], record["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{place}: not a result of alisa generate; {way_out}.") from error
        if line_run != run:
            raise InputError(
                f"{place}: comes from a run with another model, policy or sampling settings "
                f"(run {line_run}, now {run}); {way_out}."
            )
        if not isinstance(index, int) or not 0 <= index < len(prompts) or prompts[index] != prompt:
            raise InputError(f"{place}: its prompt is not prompt {index} of this run; {way_out}.")
        finished.add(index)
    torn = data[whole:]
    if torn and not _LINE_START.startswith(torn[: len(_LINE_START)]):
        raise InputError(f"{path}: its last line is not a result of alisa generate; {way_out}.")
    if torn:
        os.truncate(path, whole)
    return finished
