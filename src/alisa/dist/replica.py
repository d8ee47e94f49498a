"""One engine of a fleet: what runs inside a Ray actor, and what the driver hears of it."""

from __future__ import annotations

import logging
import os
import platform
import resource
import threading
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from alisa import __version__
from alisa.dist.share import ReplicaShare
from alisa.errors import AlisaError

_LOG = logging.getLogger("alisa.dist")


@dataclass(frozen=True, slots=True)
class ShardCount:
    """What became of a shard."""

    num_texts: int
    num_failed: int = 0
    """Texts that ended in an error of the engine; a later run does them again."""
    problem: str = ""
    """The first of these errors."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The work cannot be done as it is: an error that the user can mend, as its sentence."""

    problem: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An error that nobody foresaw, such as a lack of memory on a GPU: nobody knows what the engine is good for now."""

    problem: str


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """Where a replica runs."""

    host: str
    pid: int
    node_id: str
    version: str
    """Of alisa there."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What a replica has done since it was ready."""

    num_texts: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0


class Progress:
    """Counts what is finished; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_texts = 0
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """One more text, of this many tokens."""
        with self._lock:
            self._num_texts += 1
            self._num_tokens += num_tokens

    def read(self) -> tuple[int, int]:
        """Texts and tokens so far."""
        with self._lock:
            return self._num_texts, self._num_tokens


class ShardRunner(Protocol):
    """A loaded model that works on shards; two threads may run one each at the same time."""

    def run(self, task: Any) -> ShardCount:  # noqa: ANN401 - what `ShardSource.task` gave
        """The shard is finished and its file has its name.

        Raises:
            AlisaError: it cannot be; what is finished of it is kept.
        """
        ...


class ShardWork(Protocol):
    """What every replica does, as plain values that travel to it."""

    def open(self, share: ReplicaShare, progress: Progress) -> ShardRunner:
        """The model is loaded.

        Raises:
            AlisaError: it cannot be.
        """
        ...


class Replica:
    """The actor. Errors are returned, because not every exception travels."""

    def __init__(self, work: ShardWork, share: ReplicaShare) -> None:
        self._work = work
        self._share = share
        self._progress = Progress()
        self._runner: ShardRunner | None = None
        self._ready_s = perf_counter()

    def open(self) -> ReplicaPlace | Refused | Failed:
        """Load the model, on as many threads as the replica has processors."""
        try:
            self._runner = self._work.open(self._share, self._progress)
        except AlisaError as error:
            return Refused(str(error))
        except Exception as error:
            return _failed(error)
        self._ready_s = perf_counter()
        return ReplicaPlace(platform.node(), os.getpid(), _node_id(), __version__)

    def run(self, task: object) -> ShardCount | Refused | Failed:
        """Work on one shard to its end."""
        assert self._runner is not None, "open comes first"
        try:
            return self._runner.run(task)
        except AlisaError as error:
            return Refused(str(error))
        except Exception as error:
            return _failed(error)

    def status(self) -> ReplicaStatus:
        """How far it is."""
        num_texts, num_tokens = self._progress.read()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return ReplicaStatus(num_texts, num_tokens, perf_counter() - self._ready_s, peak)


def _failed(error: Exception) -> Failed:
    """What the driver hears of it; Ray's log of this process has the way that led to it."""
    _LOG.error("a replica has failed", exc_info=error)
    first_line = str(error).strip().partition("\n")[0]
    return Failed(f"{type(error).__name__}: {first_line}")


def _node_id() -> str:
    """Ray's name of the machine that this process runs on."""
    from alisa.dist.extra import load_ray

    return str(load_ray().get_runtime_context().get_node_id())
