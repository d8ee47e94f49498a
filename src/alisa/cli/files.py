"""Files that commands write: never over another file of the same command, never half, never by two processes.

Everything that is JSON goes through `to_json`, so that no file and no line holds NaN or Infinity, which JSON has not.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alisa.errors import InputError

STANDARD_INPUT = Path("-")


class BusyFileError(InputError):
    """Another process has the lock of a file."""


def to_json(value: object) -> str:
    """`value` on one line of JSON; numbers that are not finite become null, paths text and sets sorted lists."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_plain)


def json_line(value: object) -> bytes:
    r"""`to_json` as a line of UTF-8; half a surrogate pair, which UTF-8 has not, stays the \udXXX that JSON knows."""
    return to_json(value).encode("utf-8", "backslashreplace") + b"\n"


def refuse_same_file(paths: Mapping[str, Path | None]) -> None:
    """Check that no two paths of a command mean one file, by whatever names and links.

    Args:
        paths: by what the user calls them; None: not given.

    Raises:
        InputError: two of them are one file; nothing has been opened.
    """
    given = [(name, path) for name, path in paths.items() if path is not None]
    for (first, path), (second, other) in combinations(given, 2):
        if _is_same_file(path, other):
            raise InputError(f"{first} and {second} are the same file, {other}; give each a file of its own.")


def write_whole(path: Path, text: str) -> None:
    """Put `text` into the file at `path`, which until then holds what it held.

    Raises:
        InputError: it cannot be written; nothing has changed.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():  # a pipe or a device has no place to be renamed to
            target.write_text(text, encoding="utf-8")
            return
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


class JsonLinesFile:
    """A file of JSON objects, one a line, that is continued: appended to by this process and no other meanwhile.

    A failed `append` leaves all earlier lines intact and at most one torn line, which the next run cuts off. The lock
    is the system's and ends with the process, however that ends.
    """

    def __init__(self, path: Path, *, line_start: bytes, writer: str, way_out: str) -> None:
        """Open the file and take the lock; what is in it stays as it is.

        Args:
            path: of the file; need not be there yet.
            line_start: how every line of ours begins, which tells a torn one from the end of somebody's own file.
            writer: whose lines these are, for messages.
            way_out: what to do when the file holds something else.

        Raises:
            InputError: it cannot be written, or another process has the lock.
        """
        self.path = path
        self._line_start = line_start
        self._problem = f"not a {writer}; {way_out}"
        try:
            # Unbuffered: a line is with the system when `append` returns, and closing cannot fail a second time.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}.") from error
        # A device such as /dev/full or a pipe has no past to continue, and others may write to it too.
        self._is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        self._num_whole = 0  # bytes of whole lines that `read` has found
        if self._is_regular:
            self._lock()

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Place, for messages, and content of every whole line.

        Raises:
            InputError: a line, or the torn end, is not ours.
        """
        data = self.path.read_bytes() if self._is_regular else b""
        self._num_whole = whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            place = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: {self._problem}.") from error
            if not isinstance(record, dict):
                raise InputError(f"{place}: {self._problem}.")
            yield place, record
        torn = data[whole : whole + len(self._line_start)]
        if not self._line_start.startswith(torn):
            raise InputError(f"{self.path}: its last line is {self._problem}.")

    def refuse(self, place: str) -> InputError:
        """The error for a line that is no line of ours."""
        return InputError(f"{place}: {self._problem}.")

    def cut_torn_line(self) -> None:
        """Remove the end of a line that an earlier process could not finish; after `read`, which has looked at it."""
        if self._is_regular:
            os.ftruncate(self._file.fileno(), self._num_whole)

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line; it is with the system on return.

        Raises:
            OSError: the system refuses, for example because the disk is full.
        """
        line = json_line(record)
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Give the lock up."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BusyFileError(
                f"Another process is writing to {self.path}; wait until it has finished, or choose another file."
            ) from error
        except OSError:  # a file system that knows no locks: nothing to be had there
            return


def _is_same_file(one: Path, other: Path) -> bool:
    try:
        first, second = _status(one), _status(other)
    except OSError:  # at least one is not there yet
        return os.path.realpath(one) == os.path.realpath(other)
    # Devices may be named twice: /dev/null for everything that is not wanted.
    return os.path.samestat(first, second) and stat.S_ISREG(first.st_mode)


def _status(path: Path) -> os.stat_result:
    return os.fstat(0) if path == STANDARD_INPUT else path.stat()


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value
