"""The results of all shards in one file: the order of the prompts, every text once, and none is missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alisa.cli.shards import Shard
from alisa.errors import InputError


@dataclass(frozen=True, slots=True)
class Merged:
    """What is in the file."""

    num_results: int
    num_errors: int
    """Prompts that could not be used or were given up; their results have `error`."""
    first_error: str
    num_doubles: int
    """Lines that were left out, because their text was there already."""


def merge_shards(files: Iterator[tuple[Shard, Path]], target: Path) -> Merged:
    """`target` holds the results of all shards; until it is whole the name leads to nothing.

    One shard is in memory at a time.

    Args:
        files: every shard and its results, in the order of the prompts.
        target: of the results.

    Raises:
        InputError: a shard lacks a result or holds one of another shard, or the disk is full; nothing is lost.
    """
    total = Merged(0, 0, "", 0)
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as out:
            for shard, path in files:
                lines, doubles = _sorted_lines(shard, path)
                out.writelines(line.data for line in lines)
                errors = [line.error for line in lines if line.error]
                total = Merged(
                    total.num_results + len(lines),
                    total.num_errors + len(errors),
                    total.first_error or next(iter(errors), ""),
                    total.num_doubles + doubles,
                )
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{target} cannot be written: {error.strerror}; every shard is kept. Make room and run the same command "
            "again."
        ) from error
    return total


def remove_shards(directory: Path) -> None:
    """What has been merged does not lie there twice."""
    shutil.rmtree(directory / "shards", ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Line:
    data: bytes
    error: str


def _sorted_lines(shard: Shard, path: Path) -> tuple[list[_Line], int]:
    """The results of one shard, and how many lines there were in addition."""
    found: dict[tuple[int, int], _Line] = {}
    doubles = 0
    for data in path.read_bytes().splitlines(keepends=True):
        record = json.loads(data)
        key = record["index"], record.get("sample", 0)
        if not shard.first <= key[0] < shard.first + shard.num_prompts:
            raise InputError(f"{path} holds a result of prompt {key[0]}, which is of another shard; delete the file.")
        doubles += key in found
        found.setdefault(key, _Line(data, record.get("error", "")))
    if len(found) != shard.num_texts:
        raise InputError(
            f"{path} holds {len(found)} of {shard.num_texts} results; delete the file and run the same command again."
        )
    return [found[key] for key in sorted(found)], doubles
