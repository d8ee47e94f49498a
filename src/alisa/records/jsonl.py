"""The one store of JSON lines: records are appended as they are finished, and the next run finds them by key.

    {"kind": "ppl", "cell": "3f2a...", "model": ..., "value": ..., ...}

A line is with the system when `append` returns. A process that is killed leaves at most one torn line at the end, which
the next one cuts off. A file of somebody else is refused and left as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from alisa.errors import InputError

Record = Mapping[str, object]

_WAY_OUT = "; choose another --output, or delete the file to start again"


def _anything(record: Record) -> str | None:
    """No complaint."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFormat:
    """What a file holds.

    Args:
        what: what a line is, for messages: "a result of alisa eval".
        first: name of the first field of every line; tells a torn line from the end of somebody else's file.
        key: name of the field that a record is found by.
        complaint: what is wrong with a record, as the rest of a sentence; None: nothing.
    """

    what: str
    first: str
    key: str
    complaint: Callable[[Record], str | None] = _anything

    @property
    def line_start(self) -> bytes:
        """The bytes that every line begins with."""
        return f'{{"{self.first}": '.encode()


class JsonlFile:
    """An open file of records by key; without a path it remembers them and writes nothing.

    A failed `append` leaves all earlier lines intact and at most one torn line, which the next run cuts off.
    """

    def __init__(self, path: Path | None, form: LineFormat, *, lock: bool = False, sync: bool = False) -> None:
        """Open `path` for appending, after reading the records that are in it.

        Args:
            path: created where it does not exist. A pipe or a device has no earlier records.
            form: what it holds.
            lock: whether a second process that opens it with a lock is refused while this one has it open.
            sync: whether a line is on the disk when `append` returns; otherwise it is with the system, which is enough
                for a killed process but not for a power failure.

        Raises:
            InputError: the file holds something else, cannot be written, or another process has locked it; it is left
                as it was.
        """
        self._path, self._form, self._sync = path, form, sync
        self._file: BinaryIO | None = None
        self._records: dict[object, Record] = {}
        if path is None:
            return
        try:
            # Unbuffered: closing writes nothing, so it cannot fail after the last `append`.
            self._file = path.open("ab", buffering=0)
            if path.is_file():
                self._open(path, self._file, lock=lock)
        except OSError as error:
            self.close()
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        except InputError:
            self.close()
            raise

    def _open(self, path: Path, file: BinaryIO, *, lock: bool) -> None:
        """Take the lock, read what is there and mend the end."""
        if lock:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{path} is being written by another process; wait for it, or choose another --output."
                ) from error
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for record in _parsed(data[:whole], path, self._form, _WAY_OUT):
            self._records[record[self._form.key]] = record
        if tail := data[whole:]:
            record = _tail_record(tail, path, self._form, _WAY_OUT)
            if record is None:
                os.ftruncate(file.fileno(), whole)
            else:
                self._records[record[self._form.key]] = record
                _write(file, b"\n")

    @property
    def keys(self) -> frozenset[object]:
        """Keys of the records that it holds."""
        return frozenset(self._records)

    def get(self, key: object) -> Record | None:
        """The newest record with this key; None: there is none."""
        return self._records.get(key)

    def append(self, record: Record) -> None:
        """Write one record.

        Raises:
            InputError: a number in it is not finite, or the system refuses, for example because the disk is full.
        """
        line = line_of(record)
        if self._file is not None:
            try:
                _write(self._file, line)
                if self._sync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                raise InputError(
                    f"{self._path} cannot be written: {error.strerror}; {len(self._records)} records are in it. Make "
                    "room and run the same command again to go on."
                ) from error
        self._records[record[self._form.key]] = record

    def close(self) -> None:
        """The file is closed and its lock is free; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path, form: LineFormat) -> list[Record]:
    """The records of a file in their order, which may hold several with one key; a torn last line is left out.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    whole = data.rfind(b"\n") + 1
    records = list(_parsed(data[:whole], path, form))
    if (tail := data[whole:]) and (record := _tail_record(tail, path, form)) is not None:
        records.append(record)
    return records


def line_of(record: Record) -> bytes:
    """The record as a line of JSON in UTF-8.

    Raises:
        InputError: a number in it is not finite, for which JSON has no word.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except ValueError as error:
        wrong = next(_not_finite(record, ""), None)
        if wrong is None:
            raise
        raise InputError(f"A record cannot be written: its {wrong}, and JSON has finite numbers only.") from error


def _not_finite(value: object, where: str) -> Iterator[str]:
    """Where a number is infinite or not a number."""
    match value:
        case float() if not isfinite(value):
            yield f"{where} is {value}"
        case Mapping():
            for name, inner in value.items():
                yield from _not_finite(inner, f"{where}.{name}" if where else str(name))
        case list() | tuple():
            for number, inner in enumerate(value):
                yield from _not_finite(inner, f"{where}[{number}]")


def _parsed(data: bytes, path: Path, form: LineFormat, way_out: str = "") -> Iterator[Record]:
    """The records of whole lines."""
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        record = _parse(line, form)
        problem = f"not {form.what}" if record is None else form.complaint(record)
        if record is None or problem is not None:
            raise InputError(f"{path}, line {number}: {problem}{way_out}.")
        yield record


def _tail_record(tail: bytes, path: Path, form: LineFormat, way_out: str = "") -> Record | None:
    """The record of a last line that lacks nothing but its end; None: a torn line of ours."""
    record = _parse(tail, form)
    if record is not None and form.complaint(record) is None:
        return record
    start = form.line_start
    if _is_json(tail) or not start.startswith(tail[: len(start)]):
        raise InputError(f"{path}: its last line is not {form.what}{way_out}.")
    return None


def _parse(line: bytes, form: LineFormat) -> Record | None:
    """The record that a line holds; None: it holds none with such a key."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get(form.key), str | int) else None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _write(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
