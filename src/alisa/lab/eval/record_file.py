"""The file of evaluation results: one JSON line for each cell of a table, appended as cells are finished.

    {"kind": "ppl", "cell": "3f2a...", "model": ..., "policy": ..., "value": ..., "standard_error": ..., ...}

`cell` is a digest of everything that decides the numbers. A file may hold cells of any number of evaluations; a run
takes those it needs from it and measures only the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from alisa.errors import InputError

Record = Mapping[str, object]

_LINE_START = b'{"kind": '
"""Every line begins with this, which tells a torn line of ours from the end of somebody's own file."""


class RecordFile:
    """An open file of cells; without a path it remembers nothing.

    `writer` is the command whose records these are.

    A failed `append` leaves all earlier lines intact and at most one torn line, which the next run cuts off.
    """

    def __init__(self, path: Path | None, writer: str = "alisa eval") -> None:
        """Open `path` for appending, after reading the cells that are in it.

        Raises:
            InputError: the file holds something else, or cannot be written; it is left as it was.
        """
        self._path = path
        self._file: BinaryIO | None = None
        self._records: dict[str, Record] = {}
        if path is None:
            return
        try:
            if path.is_file():
                self._records = _read(path, writer)
            # Unbuffered: a line is with the system when `append` returns, and closing cannot fail a second time.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error

    def get(self, cell: str) -> Record | None:
        """The record of a cell, if an earlier run has measured it."""
        return self._records.get(cell)

    def append(self, record: Record) -> None:
        """Write one cell.

        Raises:
            InputError: the system refuses, for example because the disk is full.
        """
        self._records[str(record["cell"])] = record
        if self._file is None:
            return
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written: {error.strerror}. Make room and run the same command again to go on."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _read(path: Path, writer: str) -> dict[str, Record]:
    """Cells by digest, the newest of equals; a torn last line is cut off."""
    way_out = "choose another --output, or delete the file to start again"
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    records: dict[str, Record] = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["cell"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a result of {writer}; {way_out}.") from error
    torn = data[whole:]
    if torn and not _LINE_START.startswith(torn[: len(_LINE_START)]):
        raise InputError(f"{path}: its last line is not a result of {writer}; {way_out}.")
    if torn:
        os.truncate(path, whole)
    return records
