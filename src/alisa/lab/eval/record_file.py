"""The file of evaluation results: one JSON line for each cell of a table, appended as cells are finished.

    {"kind": "ppl", "cell": "3f2a...", "model": ..., "policy": ..., "value": ..., "standard_error": ..., ...}

`cell` is a digest of everything that decides the numbers. A file may hold cells of any number of evaluations; a run
takes those it needs from it and measures only the others.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from alisa.errors import InputError
from alisa.records.jsonl import JsonlFile, LineFormat, Record
from alisa.records.schema import EvalRecord
from alisa.records.structure import structure_record

_FIELDS = frozenset(field.name for field in fields(EvalRecord)) - {"details"}


def eval_record(line: Record) -> EvalRecord:
    """The cell that a line holds.

    Raises:
        InputError: a field is missing, or has another type.
    """
    own = {name: value for name, value in line.items() if name in _FIELDS}
    return structure_record(
        EvalRecord, own | {"details": {name: value for name, value in line.items() if name not in _FIELDS}}
    )


_LEFT_OUT = ("units", "weight_dtype", "coverage", "layers")
"""What a line does not have where it is None."""


def eval_line(record: EvalRecord) -> dict[str, object]:
    """A cell as its line holds it."""
    values: dict[str, object] = dict(asdict(record))
    last = {name: values.pop(name) for name in ("units", "settings", "stamp")}
    del values["details"]
    line = {**values, **record.details, **last}
    return {name: value for name, value in line.items() if value is not None or name not in _LEFT_OUT}


def _complaint(line: Record) -> str | None:
    try:
        eval_record(line)
    except InputError as error:
        return f"not a result of alisa eval ({error})"
    return None


EVAL_LINES = LineFormat(what="a result of alisa eval", first="kind", key="cell", complaint=_complaint)


class RecordFile:
    """An open file of cells; without a path it remembers them and writes nothing."""

    def __init__(self, path: Path | None) -> None:
        """Open `path` for appending, after reading the cells that are in it; no other process has it open.

        Raises:
            InputError: as for `JsonlFile`.
        """
        self._file = JsonlFile(path, EVAL_LINES, lock=True)

    def get(self, cell: str) -> EvalRecord | None:
        """The record of a cell, if an earlier run has measured it."""
        line = self._file.get(cell)
        return None if line is None else eval_record(line)

    def append(self, record: EvalRecord) -> None:
        """Write one cell.

        Raises:
            InputError: a figure is not finite, or the system refuses, for example because the disk is full.
        """
        self._file.append(eval_line(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
