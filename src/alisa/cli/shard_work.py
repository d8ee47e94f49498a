"""What a replica does with a shard: as `alisa generate` would with a file of its own, and a poison prompt ends alone.

A prompt that kills the process (out of memory, a crash of native code) gives no error to catch. So it is counted how
many replicas died while a text was in the model. Texts without a death run all together, those with one in groups of
16, those with more alone; and only who has died alone several times is given up, because processes die of other things
too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alisa.cli.files import BusyFileError, to_json, write_whole
from alisa.cli.job import ChatFrame, Job, run_job
from alisa.cli.job_directory import ShardFiles, ShardTask, TextDeaths
from alisa.cli.prompts import Prompt
from alisa.cli.results import ResultFile, error_record
from alisa.config import EngineConfig, SamplingParams
from alisa.dist.replica import Progress, ShardCount
from alisa.dist.share import ReplicaShare
from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.llm import LLM

GROUP = 16
"""Texts that run together after a replica died of one of them."""

LOCK_WAIT_S = 60.0
"""How long a dead replica may take to give its file up: Ray says that it is dead before the system has ended it."""


@dataclass(frozen=True, kw_only=True)
class GenerateWork:
    """The options of the command, as every replica needs them."""

    engine: EngineConfig
    sampling: SamplingParams
    takes_own_sampling: bool
    """The model's files say how to sample, where no option does."""
    chat: ChatFrame | None
    skip_invalid: bool
    run: str
    directory: Path
    """Of the job, on a disk that all machines share."""

    def open(self, share: ReplicaShare, progress: Progress) -> ShardGenerator:
        """The model is loaded, and the engine keeps to the replica's share of its machine.

        Raises:
            AlisaError: the directory cannot be seen here, or the model cannot be had.
        """
        if not (self.directory / "job.json").is_file():
            raise InputError(
                f"{os.uname().nodename} does not see {self.directory}; --output must be on a disk that all machines of "
                "the cluster share."
            )
        steps = ThreadPoolExecutor(1)

        def load() -> LLM:
            share.use_threads()
            llm = self.make_llm(share)
            llm.generate([[0]], SamplingParams(max_tokens=1))  # the engine is built in this thread too
            return llm

        llm = steps.submit(load).result()
        sampling = llm.own_sampling(self.sampling) if self.takes_own_sampling else self.sampling
        return ShardGenerator(llm, replace(self, sampling=sampling), progress, steps)

    def make_llm(self, share: ReplicaShare) -> LLM:
        """A model whose engine keeps to the share.

        Raises:
            AlisaError: the model cannot be had, or the share has no room for it.
        """
        # Here and not above: the driver never needs torch.
        from alisa.engine.loaded import load_model
        from alisa.llm import LLM

        loaded = load_model(self.engine)
        return LLM(config=share.capped(self.engine, loaded.decoder.weight_bytes), loaded=loaded)


class ShardGenerator:
    """Runs shards on one model; several threads may run one each, and one thread makes all steps.

    Each thread that computes has an OpenMP team of its own, and where there are more threads in all teams than
    processors libgomp lets them sleep at once at every barrier: a second team, even an idle one, slows a small model
    down. So the second shard waits for its turn to be read; its prompts fill the batch meanwhile, and its results wait
    with it.

    Args:
        llm: the model.
        work: what is asked of it.
        progress: counts what is finished.
        steps: the thread that has loaded the model and makes its steps.
    """

    def __init__(self, llm: LLM, work: GenerateWork, progress: Progress, steps: Executor) -> None:
        self._llm = llm
        self._work = work
        self._progress = progress
        self._steps = steps

    def run(self, task: ShardTask) -> ShardCount:
        """All results of the shard are in the file with its last name.

        Raises:
            AlisaError: a prompt cannot be used, or the file cannot be written; what is finished is in it.
        """
        files, prompts = task.files, task.prompts.read()
        failed: dict[int, str] = {}
        with _locked_results(files, prompts, self._work.run, self._progress) as results:
            if files.whole.exists():  # by a replica that was believed dead, before it gave the lock up
                files.part.unlink()
                return ShardCount(0)
            earlier = len(results.finished)
            self._give_up(task, prompts, results)
            for group in groups(task, len(prompts), results.finished):
                write_whole(files.running, to_json(group) + "\n")
                failed |= run_job(self._llm, self._job(prompts, group), results, self._read_in).failed
            if not failed:
                _rename(files)
            count = len(results.finished) - earlier
        return ShardCount(count, len(failed), failed[min(failed)] if failed else "")

    def _read_in(self, work: Callable[[], None]) -> None:
        self._steps.submit(work).result()

    def _job(self, prompts: Sequence[Prompt], group: Sequence[int]) -> Job:
        work = self._work
        return Job(
            prompts=tuple(prompts),
            todo=tuple(group),
            chat=work.chat,
            sampling=work.sampling,
            skip_invalid=work.skip_invalid,
            verify=False,
            run=work.run,
            output=work.directory,
            quiet=True,
        )

    def _give_up(self, task: ShardTask, prompts: Sequence[Prompt], results: ResultFile) -> None:
        """Texts that killed too many replicas get an error for a result."""
        for place, deaths in sorted(task.deaths.items()):
            if deaths.alone >= task.max_deaths and place not in results.finished:
                problem = f"{deaths.alone} processes died while they worked on this prompt and on nothing else."
                results.append(place, error_record(prompts[place], problem, self._work.run))


def groups(task: ShardTask, num_texts: int, finished: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Places of the texts that run together, the least suspect first."""
    todo = [place for place in range(num_texts) if place not in finished]
    innocent = tuple(place for place in todo if place not in task.deaths)
    suspects = [place for place in todo if task.deaths.get(place) == TextDeaths(together=1)]
    alone = [place for place in todo if place in task.deaths and place not in suspects]
    if innocent:
        yield innocent
    for begin in range(0, len(suspects), GROUP):
        yield tuple(suspects[begin : begin + GROUP])
    for place in alone:
        yield (place,)


class _CountedResults(ResultFile):
    """Tells how many results, and of how many tokens, have come."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], run: str, progress: Progress) -> None:
        super().__init__(path, prompts, run)
        self._progress = progress

    def append(self, index: int, record: Mapping[str, object]) -> None:
        """Write one result, and count it."""
        super().append(index, record)
        tokens = record.get("output_tokens", 0)
        self._progress.add(tokens if isinstance(tokens, int) else 0)


def _locked_results(files: ShardFiles, prompts: Sequence[Prompt], run: str, progress: Progress) -> ResultFile:
    """The results of a shard so far, which no other process writes to any more."""
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return _CountedResults(files.part, prompts, run, progress)
        except BusyFileError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _rename(files: ShardFiles) -> None:
    """The shard is done: on the disk, and by name.

    Raises:
        InputError: the disk is full, or gone.
    """
    try:
        with files.part.open("rb") as part:
            os.fsync(part.fileno())
        files.part.replace(files.whole)
    except OSError as error:
        raise InputError(
            f"{files.part} cannot be written: {error.strerror}. Run the same command again to go on."
        ) from error
    with suppress(OSError):
        files.running.unlink(missing_ok=True)
