"""A file of prompts in shards: a few hundred lines each, known by where they lie in the file.

The whole file is read once, to check and to count it; nothing of it but the offsets of the shards stays in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alisa.cli.prompts import Prompt, each_sample, num_samples, read_line, without_mark
from alisa.errors import InputError

_SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Shard:
    """Some lines of a file that follow each other."""

    number: int
    first: int
    """Place of its first prompt in the list of all."""
    first_line: int
    """From 1."""
    start: int
    end: int
    """Bytes of the file."""
    num_prompts: int
    num_texts: int
    """Prompts times the texts that are wanted for each."""


@dataclass(frozen=True, slots=True)
class ShardedInput:
    """A file of prompts, cut.

    Args:
        source: the file.
        shards: one after the other.
        fingerprint: of all of its bytes that are used.
        n: texts for each prompt, where its line does not say.
        keep_invalid: lines that cannot be used are prompts with a problem.
    """

    source: Path
    shards: tuple[Shard, ...]
    fingerprint: str
    n: int
    keep_invalid: bool

    @property
    def num_texts(self) -> int:
        """How many results there will be."""
        return sum(shard.num_texts for shard in self.shards)

    def data(self, shard: Shard) -> bytes:
        """The lines of a shard.

        Raises:
            InputError: the file is not there any more.
        """
        try:
            with self.source.open("rb") as file:
                file.seek(shard.start)
                return file.read(shard.end - shard.start)
        except OSError as error:
            raise InputError(f"{self.source} cannot be read: {error.strerror}.") from error


def cut_input(source: Path, *, shard_size: int, n: int, limit: int | None, keep_invalid: bool) -> ShardedInput:
    """The shards of a file.

    Args:
        source: a .jsonl or .txt file.
        shard_size: prompts in each but the last.
        n: texts for each prompt, where its line does not say.
        limit: take only this many prompts from the beginning.
        keep_invalid: a line that cannot be used is a prompt with a problem.

    Raises:
        InputError: the file cannot be read, holds no prompt, a line is not as expected, or two prompts have one id.
    """
    if source.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{source} cannot be cut into shards; a file of lines is needed, whose name ends in .jsonl or .txt."
        )
    shards: list[Shard] = []
    begun: list[tuple[_Line, Prompt]] = []
    seen: set[str | int] = set()
    digest = hashlib.sha256()

    def cut() -> None:
        (first_line, _), (last_line, _) = begun[0], begun[-1]
        before = shards[-1].first + shards[-1].num_prompts if shards else 0
        num_texts = sum(num_samples(prompt, n) for _, prompt in begun)
        shards.append(
            Shard(len(shards), before, first_line.number, first_line.start, last_line.end, len(begun), num_texts)
        )
        begun.clear()

    for num_prompts, line in enumerate(_lines(source)):
        if num_prompts == limit:
            break
        place = f"{source}, line {line.number}"
        prompt = read_line(line.data, place, source.suffix.lower(), keep_invalid=keep_invalid)
        if prompt.id is not None:
            if prompt.id in seen:
                raise InputError(f"{place}: the id {prompt.id!r} is also that of an earlier line; ids must differ.")
            seen.add(prompt.id)
        digest.update(line.data.strip() + b"\n")
        begun.append((line, prompt))
        if len(begun) == shard_size:
            cut()
    if begun:
        cut()
    if not shards:
        raise InputError(f"{source} holds no prompt.")
    return ShardedInput(source, tuple(shards), digest.hexdigest()[:16], n, keep_invalid)


@dataclass(frozen=True, slots=True)
class ShardPrompts:
    """What travels to a replica: the lines of a shard, and what it takes to read them as they would be in the file."""

    shard: Shard
    data: bytes
    source: Path
    """For messages, and its ending says how lines are written."""
    n: int
    keep_invalid: bool

    def read(self) -> tuple[Prompt, ...]:
        """The prompts, one for each text."""
        prompts = [
            read_line(line, f"{self.source}, line {number}", self.source.suffix.lower(), keep_invalid=self.keep_invalid)
            for number, line in enumerate(self.data.split(b"\n"), self.shard.first_line)
            if line.strip()
        ]
        return each_sample(prompts, self.n, self.shard.first)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    start: int
    end: int
    data: bytes


def _lines(source: Path) -> Iterator[_Line]:
    """The lines that hold something."""
    try:
        with source.open("rb") as file:
            end = 0
            for number, whole in enumerate(file, 1):
                data = without_mark(whole) if number == 1 else whole
                start, end = end + len(whole) - len(data), end + len(whole)
                if data.strip():
                    yield _Line(number, start, end, data)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}.") from error
