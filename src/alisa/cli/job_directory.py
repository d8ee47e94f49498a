"""What `alisa generate --ray` keeps on disk, so that the same command goes on after whatever happened.

    DIR/job.json             what is asked; another job is refused
    DIR/deaths.jsonl         replicas that died, and what they worked on; locked by the command that runs
    DIR/shards/00003.part    results of a shard, as `alisa generate` writes and continues them
    DIR/shards/00003.running which texts of it were in the model last
    DIR/shards/00003.jsonl   the same file once it is whole: the new name is the end of the shard
    DIR/results.jsonl        all results, once each, in the order of the prompts; the shards are gone then

Ray may run a shard twice. The lock on its file, its results by prompt, and the seed of each prompt make that the same
as once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from alisa.cli.files import to_json, write_whole
from alisa.cli.shards import ShardedInput, ShardPrompts
from alisa.dist.replica import ShardCount
from alisa.errors import InputError
from alisa.records.document import read_json
from alisa.records.jsonl import JsonlFile, LineFormat

_Deaths: TypeAlias = "dict[int, dict[int, TextDeaths]]"
"""By shard, and by the place of a text in it."""

_DEATH = LineFormat(what="a death of a replica", first="death", key="death")


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Names of the files of one shard."""

    directory: Path
    number: int

    @property
    def part(self) -> Path:
        """Results so far."""
        return self._named("part")

    @property
    def running(self) -> Path:
        """Texts that are in the model, as a JSON list of their places in the shard."""
        return self._named("running")

    @property
    def whole(self) -> Path:
        """All results."""
        return self._named("jsonl")

    def _named(self, ending: str) -> Path:
        return self.directory / "shards" / f"{self.number:05}.{ending}"


@dataclass(frozen=True, slots=True)
class TextDeaths:
    """How many replicas died while a text was in the model."""

    together: int = 0
    """With others, any of which may have been the reason."""
    alone: int = 0

    def and_one(self, *, alone: bool) -> TextDeaths:
        """With one more."""
        return TextDeaths(self.together + (not alone), self.alone + alone)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard as it travels to a replica."""

    prompts: ShardPrompts
    files: ShardFiles
    deaths: Mapping[int, TextDeaths]
    """By the place of a text in the shard."""
    max_deaths: int


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What must be equal for two commands to share a directory."""

    run: str
    """Digest of the settings that decide the tokens."""
    input: str
    """Fingerprint of the prompts."""
    num_texts: int
    shard_size: int


class JobDirectory:
    """The state of a job on disk, locked by this process; the shards of it that are still to be done.

    Args:
        path: of the directory; made where it is not there.
        prompts: the input, cut.
        facts: what is asked.
        max_deaths: replicas that may die of a text alone before it is given up.

    Raises:
        InputError: it holds another job, another process works on it, or it cannot be written.
    """

    def __init__(self, path: Path, prompts: ShardedInput, facts: JobFacts, max_deaths: int) -> None:
        self.path = path
        self._prompts = prompts
        self._max_deaths = max_deaths
        self.counts: dict[int, ShardCount] = {}
        """Shards that came to their end in this process."""
        try:
            (path / "shards").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path} cannot be a directory of results: {error.strerror}; choose another.") from error
        self._deaths_file = JsonlFile(path / "deaths.jsonl", _DEATH, lock=True)
        try:
            self._agree(facts)
            self._deaths = self._read_deaths()
        except BaseException:
            self._deaths_file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deaths_file.close()

    @property
    def results(self) -> Path:
        """All results, once the job is done."""
        return self.path / "results.jsonl"

    @property
    def waiting(self) -> tuple[int, ...]:
        """Shards that are not whole."""
        return tuple(shard.number for shard in self._prompts.shards if not self.files(shard.number).whole.exists())

    def files(self, number: int) -> ShardFiles:
        """Of one shard."""
        return ShardFiles(self.path.absolute(), number)

    def num_finished(self) -> int:
        """Results that are on disk, as far as whole lines go."""
        return sum(self._num_lines(shard.number) for shard in self._prompts.shards)

    def task(self, number: int) -> ShardTask:
        """A shard for a replica, which needs to see this directory but not the input."""
        prompts, shard = self._prompts, self._prompts.shards[number]
        lines = ShardPrompts(shard, prompts.data(shard), prompts.source, prompts.n, prompts.keep_invalid)
        return ShardTask(lines, self.files(number), dict(self._deaths.get(number, {})), self._max_deaths)

    def is_suspect(self, number: int) -> bool:
        """Whether a replica died while it worked on this shard."""
        return number in self._deaths

    def died(self, number: int) -> None:
        """A replica died: all texts of this shard that were in the model may be the reason."""
        try:
            texts = read_json(self.files(number).running)
        except InputError:  # none of them was
            return
        # Only suspect shards run without another one in the same replica.
        alone = self.is_suspect(number) and len(texts) == 1
        death = {"death": len(self._deaths_file.keys), "shard": number, "texts": texts, "alone": alone}
        self._deaths_file.append(death)
        _count(self._deaths, death)

    def done(self, number: int, count: ShardCount) -> None:
        """Remember what became of it."""
        self.counts[number] = count

    def _agree(self, facts: JobFacts) -> None:
        """The directory is of this job, or is now.

        Raises:
            InputError: it is of another one.
        """
        file = self.path / "job.json"
        if not file.exists():
            write_whole(file, to_json(asdict(facts)) + "\n")
            return
        found: Any = read_json(file)
        now = asdict(facts)
        if found != now:
            names = {"run": "model, policy or sampling settings", "input": "prompts", "num_texts": "prompts"}
            other = next((name for name in now if not isinstance(found, dict) or found.get(name) != now[name]), "run")
            raise InputError(
                f"{self.path} holds the results of a job with other {names.get(other, other)}; choose another "
                "--output, or delete the directory to start again."
            )

    def _read_deaths(self) -> _Deaths:
        deaths: _Deaths = {}
        for key in self._deaths_file.keys:
            _count(deaths, self._deaths_file.get(key))
        return deaths

    def _num_lines(self, number: int) -> int:
        files = self.files(number)
        for path in (files.whole, files.part):
            try:
                with path.open("rb") as file:
                    return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
            except FileNotFoundError:
                continue
        return 0


def _count(deaths: _Deaths, death: Any) -> None:  # noqa: ANN401 - a record
    """Enter one death."""
    of_shard = deaths.setdefault(death["shard"], {})
    for place in death["texts"]:
        of_shard[place] = of_shard.get(place, TextDeaths()).and_one(alone=death["alone"])
