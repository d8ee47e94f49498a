"""Blocks as files of one directory, which other processes may use at the same time.

A block is written under a name of its own and renamed when it is complete, so a file is there whole or not at all. It
says which block it holds, and carries a checksum; one that is damaged is deleted, and its block is computed again. The
name of a block covers its model and its arithmetic (`alisa.engine.prefix`): files of other models are not found.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from alisa.config import format_bytes
from alisa.errors import InputError
from alisa.scheduler.prefix import BlockName

_LOG = logging.getLogger("alisa")

_MAGIC = b"alisa KV block 1"
_SUFFIX = ".kv"
_UNFINISHED = ".part"
_UNFINISHED_S = 3600.0
"""Age after which a file that was not renamed is taken for one whose writer has died."""
_LOOK_SHARE = 16
"""The directory is read again when this process has written one part in this many of the cap: others write, too."""


class BlockFiles:
    """The blocks of a directory, the ones not used for longest deleted when it is full.

    Several processes that fill it at the same time may pass the cap by a sixteenth each.

    Args:
        directory: made where it is not there, for this user alone.
        max_bytes: most bytes of its files.

    Raises:
        InputError: the directory cannot be used.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._written = 0
        self._is_usable = True
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
            self._trim()
        except OSError as error:
            raise InputError(f"{directory} cannot hold the prefix cache: {error.strerror}.") from error

    def write(self, name: BlockName, block: memoryview) -> None:
        """The block is in the directory, and was used now; if the system refuses, nothing is written any more."""
        if not self._is_usable:
            return
        path = self._path(name)
        with suppress(FileNotFoundError):
            os.utime(path)
            return
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor, unfinished = tempfile.mkstemp(suffix=_UNFINISHED, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_header(name, block))
                    file.write(block)
                os.replace(unfinished, path)
            except BaseException:
                Path(unfinished).unlink(missing_ok=True)
                raise
            self._written += block.nbytes
            if self._written > self._max_bytes // _LOOK_SHARE:
                self._trim()
        except OSError as error:
            self._is_usable = False
            _LOG.warning(
                "the prefix cache in %s is not written to any more: %s.", self._directory, error.strerror or error
            )

    def has(self, name: BlockName) -> bool:
        """Whether there is a file for the block, damaged or not."""
        return self._path(name).exists()

    def read(self, name: BlockName, block: memoryview) -> bool:
        """Whether `block` holds the block of this name now; if not, it holds anything."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                header = file.read(len(_header(name, block[:0])))
                is_whole = file.readinto(block) == block.nbytes and not file.read(1)
            if is_whole and header == _header(name, block):
                os.utime(path)
                return True
            path.unlink(missing_ok=True)
            _LOG.warning("%s of the prefix cache is damaged; it is deleted, and its tokens are computed again.", path)
        except FileNotFoundError:
            pass
        except OSError as error:
            _LOG.warning("%s of the prefix cache cannot be read: %s.", path, error.strerror or error)
        return False

    def _path(self, name: BlockName) -> Path:
        text = name.hex()
        return self._directory / text[:2] / f"{text}{_SUFFIX}"

    def _trim(self) -> None:
        """What has not been used for longest is gone, so that there is room to write until the next look."""
        self._written = 0
        files = sorted(self._files())
        spare = sum(size for _, size, _ in files) - (self._max_bytes - self._max_bytes // _LOOK_SHARE)
        for used_s, size, path in files:
            is_dead = path.suffix == _UNFINISHED and used_s < time.time() - _UNFINISHED_S
            if spare > 0 or is_dead:
                path.unlink(missing_ok=True)
                spare -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of the last use, size and path of every file of the cache; others in the directory are not touched."""
        for pattern in (f"??/*{_SUFFIX}", f"??/*{_UNFINISHED}"):
            for path in self._directory.glob(pattern):
                try:
                    found = path.stat()
                except FileNotFoundError:  # another process has deleted it
                    continue
                yield found.st_mtime, found.st_size, path


def check_size(max_bytes: int, block_bytes: int) -> None:
    """Raise InputError where a directory of this size holds not even a few blocks."""
    if max_bytes < _LOOK_SHARE * block_bytes:
        raise InputError(
            f"A prefix cache of {format_bytes(max_bytes)} on disk holds not even {_LOOK_SHARE} blocks of "
            f"{format_bytes(block_bytes)}; raise --prefix-cache-disk-memory."
        )


def _header(name: BlockName, block: memoryview) -> bytes:
    """What stands before a block's bytes: that it is one, which one, and a checksum of both."""
    checksum = blake2b(name, digest_size=16)
    checksum.update(block)
    return _MAGIC + name + checksum.digest()
