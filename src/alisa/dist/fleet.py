"""Shards go to replicas until all are done: the loop of the driver.

Ray gives every task at least once: it places actors, says when one has died, and moves their arguments. Which shard is
finished, who tries again and who is to blame is ours, because only the files on disk outlive the driver.

    shards waiting ---> replica (two shards, so that its batch stays full while one runs out) ---> done
         ^                 | dies
         +-----------------+  its shards wait again; what they have finished is in their files
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, Protocol, TypeAlias

from alisa import __version__
from alisa.dist.cluster import ReplicaSize
from alisa.dist.extra import load_ray
from alisa.dist.replica import (
    Failed,
    Refused,
    Replica,
    ReplicaPlace,
    ReplicaStatus,
    ShardCount,
    ShardWork,
)
from alisa.errors import InputError

SHARDS_AT_ONCE = 2
"""Of a replica: when the prompts of one run out, those of the next fill the batch."""

POLL_S = 0.5
"""How often replicas are asked how far they are."""

LAST_STATUS_S = 5.0
"""How long a report waits for a replica."""

MOST_FAILED_STARTS = 3
"""Replicas that die one after the other before any is ready; the next would too."""


_Asked: TypeAlias = int | Literal["open", "alive"]
"""A shard; to load the model; whether it is still there."""


class ShardSource(Protocol):
    """The shards of a job, known to the driver by number."""

    def task(self, number: int) -> object:
        """What a replica needs to know of a shard; it travels there."""
        ...

    def is_suspect(self, number: int) -> bool:
        """Whether a replica died of this shard, or of one that ran beside it: it runs alone."""
        ...

    def died(self, number: int) -> None:
        """The replica that worked on this shard is dead, and its machine is not."""
        ...

    def done(self, number: int, count: ShardCount) -> None:
        """The shard has come to its end."""
        ...


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one replica of the fleet did, its successors after a death included."""

    name: str
    host: str = ""
    num_shards: int = 0
    num_texts: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """From ready to the end."""
    num_deaths: int = 0
    peak_rss_bytes: int = 0


class FleetWatcher(Protocol):
    """Who is told what happens."""

    def progress(self, reports: Sequence[ReplicaReport], num_ready: int) -> None:
        """Comes about twice a second."""
        ...

    def told(self, message: str) -> None:
        """A person should know this."""
        ...


@dataclass(slots=True)
class _Member:
    """A replica as the driver sees it."""

    name: str
    actor: Any
    place: ReplicaPlace | None = None
    """None: it is not ready yet."""
    shards: set[int] = field(default_factory=set)
    before: ReplicaReport = field(default_factory=lambda: ReplicaReport(""))
    """What its predecessors of the same name did."""
    status: ReplicaStatus = field(default_factory=ReplicaStatus)
    num_shards: int = 0
    is_lost: bool = False
    """Out of reach or dead: nothing more is asked of it."""
    asked: Any = None
    """The answer to the last question for its status, until it is here."""

    @property
    def report(self) -> ReplicaReport:
        """Of it and its predecessors."""
        before, status = self.before, self.status
        return replace(
            before,
            name=self.name,
            host=before.host if self.place is None else self.place.host,
            num_shards=before.num_shards + self.num_shards,
            num_texts=before.num_texts + status.num_texts,
            num_tokens=before.num_tokens + status.num_tokens,
            seconds=before.seconds + status.seconds,
            peak_rss_bytes=max(before.peak_rss_bytes, status.peak_rss_bytes),
        )


class Fleet:
    """Replicas of one job, as actors of the cluster that this process is connected to.

    Leaving the `with` block ends them all.

    Args:
        work: what each does.
        size: how many there are, and what each may use.
        watcher: is told what happens.
    """

    def __init__(self, work: ShardWork, size: ReplicaSize, watcher: FleetWatcher) -> None:
        self._ray: Any = load_ray()
        self._work = work
        self._size = size
        self._watcher = watcher
        self._running: dict[Any, tuple[_Member, _Asked]] = {}
        """The answers that are waited for."""
        self._num_failed_starts = 0
        self._members: list[_Member] = []

    def __enter__(self) -> Fleet:
        self._members = [self._start(f"replica {number}") for number in range(self._size.num_replicas)]
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            self._ray.kill(member.actor)

    @property
    def reports(self) -> tuple[ReplicaReport, ...]:
        """What each replica has done."""
        return tuple(member.report for member in self._members)

    def run(self, source: ShardSource, numbers: Sequence[int]) -> None:
        """All of these shards have come to their end.

        Raises:
            InputError: a replica says that the work cannot be done as it is, or replicas cannot be started.
        """
        waiting, looked_s = deque(numbers), 0.0
        while waiting or any(member.shards for member in self._members):
            self._hand_out(source, waiting)
            for answer in self._answered():
                if answer in self._running:  # not forgotten since
                    member, asked = self._running.pop(answer)
                    self._take(answer, member, asked, source, waiting)
            if perf_counter() > looked_s + POLL_S:
                looked_s = perf_counter()
                self._ask()
                self._watcher.progress(self.reports, sum(member.place is not None for member in self._members))
        for member in self._members:
            self._last_status(member)

    def _answered(self) -> Sequence[object]:
        """All answers that are here, after the first of them or `POLL_S`."""
        asked = [*self._running]
        if first := self._ray.wait(asked, num_returns=1, timeout=POLL_S)[0]:
            return self._ray.wait(asked, num_returns=len(asked), timeout=0)[0] or first
        return ()

    def _start(self, name: str, before: ReplicaReport | None = None) -> _Member:
        """A new actor, which loads its model."""
        share = self._size.share
        make_actor = self._ray.remote(
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            memory=share.memory_bytes,
            max_restarts=0,
            max_concurrency=SHARDS_AT_ONCE,
            concurrency_groups={"status": 1},
        )
        member = _Member(name, make_actor(Replica).remote(self._work, share), before=before or ReplicaReport(name))
        self._running[member.actor.open.remote()] = member, "open"
        return member

    def _hand_out(self, source: ShardSource, waiting: deque[int]) -> None:
        """Every replica with room gets a shard; a suspect one runs alone."""
        for member in sorted(self._members, key=lambda member: len(member.shards)):
            while waiting and self._takes(member, waiting[0], source):
                number = waiting.popleft()
                member.shards.add(number)
                self._running[member.actor.run.remote(source.task(number))] = member, number

    def _takes(self, member: _Member, number: int, source: ShardSource) -> bool:
        if member.place is None or member.is_lost or len(member.shards) >= SHARDS_AT_ONCE:
            return False
        return not member.shards or not any(map(source.is_suspect, (number, *member.shards)))

    def _take(self, answer: object, member: _Member, asked: _Asked, source: ShardSource, waiting: deque[int]) -> None:
        """What a replica has answered, or that it never will."""
        try:
            result = self._ray.get(answer)
        except self._ray.exceptions.ActorUnavailableError:
            # It is out of reach, which is how the loss of a machine begins; Ray knows in a quarter of a minute.
            self._forget(member)
            self._running[self._status_of(member)] = member, "alive"
            return
        except self._ray.exceptions.RayActorError:
            self._bury(member, "has died", source, waiting)
            return
        match result:
            case Refused(problem):
                raise InputError(problem)
            case Failed(problem):  # as good as dead
                self._bury(member, f"has failed ({problem})", source, waiting)
            case ReplicaPlace():
                self._num_failed_starts = 0
                member.place = result
                if result.version != __version__:
                    raise InputError(
                        f"{result.host} has alisa {result.version}, this is {__version__}; install one version on all."
                    )
            case ShardCount():
                assert isinstance(asked, int), "who is asked for a shard answers with a count"
                member.shards.discard(asked)
                member.num_shards += 1
                source.done(asked, result)
            case ReplicaStatus():  # it can be reached again, but nobody knows what became of its shards
                self._replace(member, "was out of reach", waiting)

    def _bury(self, member: _Member, what: str, source: ShardSource, waiting: deque[int]) -> None:
        """A replica is dead: by what it worked on, unless its machine is gone too."""
        if member.place is None:
            self._num_failed_starts += 1
            if self._num_failed_starts >= MOST_FAILED_STARTS:
                raise InputError(
                    f"{self._num_failed_starts} replicas ended one after the other before their model was loaded, the "
                    f"last one {what}; often it needs more memory than there is (--replica-memory, fewer --replicas)."
                )
        elif not self._is_alive(member.place.node_id):
            self._replace(member, f"has gone with its machine {member.place.host}", waiting)
            return
        for number in member.shards:
            source.died(number)
        self._replace(member, what, waiting)

    def _replace(self, member: _Member, what: str, waiting: deque[int]) -> None:
        """Another replica takes its name, and its shards wait again."""
        shards = sorted(member.shards)
        rest = f"; shards {', '.join(map(str, shards))} go on with another one." if shards else "."
        self._watcher.told(f"{member.name} {what}{rest}")
        waiting.extendleft(reversed(shards))
        self._forget(member)
        self._ray.kill(member.actor)  # where it was only out of reach
        before = replace(member.report, num_deaths=member.report.num_deaths + 1)
        self._members[self._members.index(member)] = self._start(member.name, before)

    def _forget(self, member: _Member) -> None:
        """Nothing that it was asked is waited for."""
        self._running = {answer: asked for answer, asked in self._running.items() if asked[0] is not member}
        member.asked = None
        member.is_lost = True

    def _is_alive(self, node_id: str) -> bool:
        return any(node["NodeID"] == node_id and node["Alive"] for node in self._ray.nodes())

    def _status_of(self, member: _Member) -> Any:  # noqa: ANN401 - a reference of Ray
        """The answer to how far it is, which comes while it works."""
        return member.actor.status.options(concurrency_group="status").remote()

    def _ask(self) -> None:
        """The newest status of every replica that has answered; the next question."""
        for member in self._members:
            if member.place is None or member.is_lost:
                continue
            if member.asked is not None:
                answered, _ = self._ray.wait([member.asked], timeout=0)
                if not answered:
                    continue
                self._read_status(member)
            member.asked = self._status_of(member)

    def _last_status(self, member: _Member) -> None:
        if member.place is not None and not member.is_lost:
            member.asked = self._status_of(member)
            answered, _ = self._ray.wait([member.asked], timeout=LAST_STATUS_S)
            if answered:
                self._read_status(member)

    def _read_status(self, member: _Member) -> None:
        try:
            member.status = self._ray.get(member.asked)
        except self._ray.exceptions.RayActorError:  # the answer of one of its shards will tell
            return
