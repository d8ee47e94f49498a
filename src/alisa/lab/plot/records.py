"""Lines that `alisa eval` and `alisa generate --report` wrote, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alisa.records.jsonl import LineFormat, Record, read_records

_LINES = LineFormat(what="a record of alisa eval or alisa generate", first="kind", key="kind")


def read_lines(paths: Sequence[Path]) -> list[Record]:
    """The records of all files; of cells that were measured twice, the newest.

    Raises:
        InputError: a file cannot be read, or holds something else.
    """
    records: dict[object, Record] = {}
    for path in paths:
        for number, record in enumerate(read_records(path, _LINES)):
            records[record.get("cell", (path, number))] = record
    return list(records.values())


def number(record: Record, name: str) -> float:
    """A figure of a record; NaN where it has none."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def table(record: Record, name: str) -> list[list[float]]:
    """Rows of figures of a record; none where it has none."""
    value = record.get(name)
    return value if isinstance(value, list) else []


def grouped(records: Sequence[Record], *names: str) -> dict[tuple[str, ...], list[Record]]:
    """Records by the text of some fields, in the order in which they appear."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record.get(name)) for name in names), []).append(record)
    return groups
