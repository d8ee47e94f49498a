"""The loop of the driver against a Ray that is played: replicas die at any moment, alone or with their machines.

Files, results and deaths are real; only actors and the model are not.
"""

from __future__ import annotations

import json
import random
import tempfile
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.cli.job_directory import JobDirectory, JobFacts
from alisa.cli.merge import merge_shards
from alisa.cli.shard_work import GenerateWork, ShardGenerator
from alisa.cli.shards import cut_input
from alisa.config import EngineConfig, SamplingParams
from alisa.dist import fleet as fleet_module
from alisa.dist.cluster import ReplicaSize
from alisa.dist.fleet import Fleet
from alisa.dist.share import ReplicaShare
from alisa.errors import InputError
from alisa.outputs import RequestOutput
from tests.cli.fake import FakeLLM

POISON = "poison"
BAD = "bad"
"""A prompt whose step fails with an error that nobody foresaw."""


class Killed(BaseException):
    """This process is gone."""


class RayActorError(Exception): ...


class ActorUnavailableError(RayActorError): ...


class PlayedRay:
    """One answer becomes known with each `wait`; which, and who dies of it, is drawn."""

    exceptions = SimpleNamespace(RayActorError=RayActorError, ActorUnavailableError=ActorUnavailableError)

    def __init__(self, draw: random.Random, num_deaths: int) -> None:
        self.draw, self.num_deaths = draw, num_deaths
        self.alive = {f"node-{number}": True for number in range(3)}
        self.dead: set[int] = set()
        self.answers: dict[int, object] = {}
        self.calls: dict[int, tuple] = {}

    def remote(self, **options):
        return lambda kind: SimpleNamespace(remote=lambda *args: PlayedActor(self, kind(*args)))

    def wait(self, asked, timeout, num_returns=1):
        if not any(ref in self.answers for ref in asked):
            self.answer(self.draw.choice(asked))
        ready = [ref for ref in asked if ref in self.answers][:num_returns]
        return ready, [ref for ref in asked if ref not in ready]

    def answer(self, ref: int) -> None:
        actor, name, args = self.calls[ref]
        if actor.number not in self.dead:
            try:
                answer = getattr(actor.replica, name)(*args)
                if isinstance(answer, fleet_module.ReplicaPlace):
                    answer = replace(answer, node_id=actor.node)
                self.answers[ref] = answer
                return
            except Killed:
                self.dead.add(actor.number)
                if not actor.replica._work.poisoned and self.draw.random() < 0.5:
                    self.alive[actor.node] = False
                actor.replica._work.poisoned = False
        kind = ActorUnavailableError if name != "status" and self.draw.random() < 0.5 else RayActorError
        self.answers[ref] = kind()

    def get(self, ref):
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, actor):
        self.dead.add(actor.number)

    def nodes(self):
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]


class PlayedActor:
    made = 0

    def __init__(self, ray: PlayedRay, replica) -> None:
        self.ray, self.replica = ray, replica
        PlayedActor.made += 1
        self.number = PlayedActor.made
        self.node = ray.draw.choice([name for name, alive in ray.alive.items() if alive] or ["node-9"])
        ray.alive[self.node] = True
        self.open, self.run, self.status = (self._method(name) for name in ("open", "run", "status"))

    def _method(self, name):
        def remote(*args):
            ref = len(self.ray.calls)
            self.ray.calls[ref] = self, name, args
            return ref

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Here(Executor):
    def submit(self, work, /, *args):
        done = Future()
        done.set_result(work(*args))
        return done


class MortalLLM(FakeLLM):
    """Dies of poison, and now and then of nothing, in the middle of its streams."""

    def __init__(self, ray: PlayedRay, work: PlayedWork) -> None:
        super().__init__(EngineConfig(), lambda done, total: None)
        self.ray, self.work = ray, work

    def _run(self, texts, params):
        if any(POISON in text for text in texts):
            self.work.poisoned = True
            raise Killed
        if any(BAD in text for text in texts):
            raise RuntimeError("out of memory\nin a kernel")
        for event in super()._run(texts, params):
            if isinstance(event, RequestOutput) and self.ray.num_deaths > 0 and self.ray.draw.random() < 0.2:
                self.ray.num_deaths -= 1
                raise Killed
            yield event


class PlayedWork:
    """As `GenerateWork`, with a model that dies."""

    poisoned = False

    def __init__(self, ray: PlayedRay, directory: Path) -> None:
        self.ray = ray
        self.real = GenerateWork(
            engine=EngineConfig(),
            sampling=SamplingParams(max_tokens=3),
            takes_own_sampling=False,
            chat=None,
            skip_invalid=False,
            run="run",
            directory=directory,
        )

    def open(self, share, progress):
        return ShardGenerator(MortalLLM(self.ray, self), self.real, progress, Here())


class Silent:
    def progress(self, reports, num_ready): ...

    def told(self, message): ...


SIZE = ReplicaSize(3, ReplicaShare(1, 0, 2**30))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_prompts=st.integers(1, 24),
    shard_size=st.integers(1, 8),
    poison=st.dictionaries(st.integers(0, 23), st.sampled_from((POISON, BAD)), max_size=2),
    num_deaths=st.integers(0, 2),
)
def test_every_prompt_has_one_result_whoever_dies(seed, num_prompts, shard_size, poison, num_deaths):
    texts = [f"{poison.get(index, 'text')} {index}" for index in range(num_prompts)]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        ray = PlayedRay(random.Random(seed), num_deaths)
        patch.setattr(fleet_module, "load_ray", lambda: ray)
        patch.setattr("alisa.dist.replica._node_id", lambda: "told by the played Ray")
        source = Path(name, "in.txt")
        source.write_text("\n".join(texts))
        prompts = cut_input(source, shard_size=shard_size, n=1, limit=None, keep_invalid=False)
        facts = JobFacts("run", prompts.fingerprint, num_prompts, shard_size)
        with JobDirectory(Path(name, "out"), prompts, facts, max_deaths=3) as directory:
            with Fleet(PlayedWork(ray, directory.path), SIZE, Silent()) as fleet:
                fleet.run(directory, directory.waiting)
            assert directory.waiting == ()
            merge_shards(((s, directory.files(s.number).whole) for s in prompts.shards), directory.results)
            results = [json.loads(line) for line in directory.results.read_text().splitlines()]
    assert [result["index"] for result in results] == [*range(num_prompts)]
    for index, result in enumerate(results):
        # Deaths of nothing are fewer than it takes to give a prompt up.
        assert ("error" in result) == (index in poison), result
        if index not in poison:
            assert result["text"] == f" TEXT {index} w{index} w{index}"


def test_replicas_that_never_get_ready_end_the_job(tmp_path, monkeypatch):
    ray = PlayedRay(random.Random(0), 0)
    monkeypatch.setattr(fleet_module, "load_ray", lambda: ray)
    monkeypatch.setattr("alisa.dist.replica._node_id", lambda: "told by the played Ray")

    class Dead(PlayedWork):
        def open(self, share, progress):
            raise Killed

    with (
        Fleet(Dead(ray, tmp_path), SIZE, Silent()) as fleet,
        pytest.raises(InputError, match="ended one after the other before"),
    ):
        fleet.run(SimpleNamespace(is_suspect=lambda number: False), [0])


def test_a_replica_that_refuses_ends_the_job_with_its_sentence(tmp_path, monkeypatch):
    ray = PlayedRay(random.Random(0), 0)
    monkeypatch.setattr(fleet_module, "load_ray", lambda: ray)
    monkeypatch.setattr("alisa.dist.replica._node_id", lambda: "told by the played Ray")

    class Refusing(PlayedWork):
        def open(self, share, progress):
            raise InputError("The model is not here.")

    with Fleet(Refusing(ray, tmp_path), SIZE, Silent()) as fleet, pytest.raises(InputError, match="not here"):
        fleet.run(SimpleNamespace(is_suspect=lambda number: False), [0])


def test_a_model_that_fails_to_load_is_told_with_its_error(tmp_path, monkeypatch):
    ray = PlayedRay(random.Random(0), 0)
    monkeypatch.setattr(fleet_module, "load_ray", lambda: ray)

    class Failing(PlayedWork):
        def open(self, share, progress):
            raise RuntimeError("no kernel\nmore of it")

    with (
        Fleet(Failing(ray, tmp_path), SIZE, Silent()) as fleet,
        pytest.raises(InputError, match=r"has failed \(RuntimeError: no kernel\)"),
    ):
        fleet.run(SimpleNamespace(is_suspect=lambda number: False), [0])
