"""The server's application on Ray Serve: engines that come and go with the number of calls, and a front before them.

    client -> Serve's proxy -> front (picks a replica by how the call begins) -> engine replica (the server's own app)

A replica is the whole server of `alisa serve` without its socket, so that every call is answered alike here and there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp, Message

from alisa.config import EngineConfig
from alisa.dist.call import Call, answer
from alisa.dist.cluster import ReplicaSize
from alisa.dist.extra import load_ray
from alisa.dist.front import Front, OverloadedError, ReplicaDiedError
from alisa.dist.metrics import TELL_S, MetricsBoard
from alisa.dist.share import ReplicaShare
from alisa.errors import InputError
from alisa.server.app import make_app
from alisa.server.config import ServerConfig
from alisa.server.gate import Gate
from alisa.server.run import build_service

APP = "alisa"
ENGINES = "engines"
FRONT = "front"

CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Ray's name of the actor that is there while Serve runs on a cluster."""

TARGET_SHARE = 0.75
"""Of the sequences that an engine works on together: with more calls on each, another replica is started."""

MAX_CALLS_OF_FRONT = 10_000
"""Calls that one front hands through at the same time; they wait in it, not in the proxy."""


class EngineReplica:
    """A server without a socket: the engine, and the application that speaks for it.

    Args:
        config: of the engine.
        server: of the server.
        share: what of its machine it may use.
    """

    def __init__(self, config: EngineConfig, server: ServerConfig, share: ReplicaShare) -> None:
        from ray import serve

        share.use_threads()
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service = build_service(config, server, capped=share.capped, engine_name=self._name)
        self._app = make_app(self._service, server)

    async def forward(self, key: str, call: Call) -> AsyncGenerator[Message]:
        """The messages of the answer.

        Args:
            key: what the router chose this replica by.
            call: of the client.
        """
        async for message in answer(self._app, call):
            yield message

    async def record_routing_stats(self) -> dict[str, float]:
        """Serve asks every `TELL_S`, whatever this replica works on: the time to tell the front its metrics."""
        from ray import serve

        exposition = self._service.telemetry.exposition(await self._service.status())
        # Nobody waits for it: a front that is not there gets none.
        serve.get_deployment_handle(FRONT, APP).take.remote(self._name, exposition)
        return {}

    def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if (failure := self._service.engine.failure) is not None:
            raise RuntimeError("the engine has failed") from failure


@contextmanager
def serving(config: EngineConfig, server: ServerConfig, size: ReplicaSize, *, min_replicas: int) -> Iterator[None]:
    """In the block the fleet answers calls at the address of `server`; then running calls come to their end, in time.

    Args:
        config: of every engine.
        server: where to listen, for whom, and how much anybody may ask for.
        size: the most replicas, and what each may use.
        min_replicas: those that stay when nobody calls.

    Raises:
        InputError: Ray Serve runs on the cluster already, it cannot listen there, or no engine can start.
    """
    ray = load_ray()
    if any(actor["name"] == CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True)):
        # It has an address of its own, and its end would be that of everything it serves.
        raise InputError(
            "Ray Serve runs on this cluster already, perhaps for others; `serve status` says what it serves, and "
            "`serve shutdown` ends all of that."
        )
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        try:
            serve.start(http_options={"host": server.host.strip("[]"), "port": server.port})
        except RuntimeError as error:
            raise InputError(
                f"{server.host} port {server.port} cannot be listened on by Ray Serve; try another --port."
            ) from error
        try:
            serve.run(_application(config, server, size, min_replicas), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise InputError(f"No engine can start: {_why_not(serve.status())}") from error
        yield
    finally:
        serve.delete(APP)
        if not serve.status().applications:  # of others
            serve.shutdown()


def _application(config: EngineConfig, server: ServerConfig, size: ReplicaSize, min_replicas: int) -> Any:  # noqa: ANN401 - of Ray
    """The front, and the engines behind it."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    most = config.max_num_seqs
    engines = serve.deployment(
        EngineReplica,
        name=ENGINES,
        ray_actor_options={
            "num_cpus": size.share.num_cpus,
            "num_gpus": size.share.num_gpus,
            "memory": size.share.memory_bytes,
        },
        max_ongoing_requests=most,
        max_queued_requests=server.max_waiting,
        graceful_shutdown_timeout_s=server.drain_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class="alisa.dist.prefix_router.PrefixRouter", request_routing_stats_period_s=TELL_S
        ),
        autoscaling_config={
            "min_replicas": min_replicas,
            "initial_replicas": min_replicas,
            "max_replicas": size.num_replicas,
            "target_ongoing_requests": max(1, math.floor(most * TARGET_SHARE)),
        },
    )
    front = serve.deployment(
        serve.ingress(front_builder(server))(FrontReplica),
        name=FRONT,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CALLS_OF_FRONT,
        graceful_shutdown_timeout_s=server.drain_timeout_s,
    )
    return front.bind(engines.bind(config, server, size.share))


def _why_not(status: Any) -> str:  # noqa: ANN401 - of Ray
    """The sentence with which it failed: Ray has it in the last line that is not indented."""
    app = status.applications[APP]
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    lines = [line for message in messages for line in message.splitlines() if line and not line.startswith(" ")]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("alisa.errors.")]
    return next(iter([*ours, *reversed(lines)]), "Ray says no more")


class FrontReplica:
    """What Serve knows of the front beside its application: engines tell their metrics here.

    Args:
        engines: Ray's handle of them, which the front needs so that Serve starts both.
    """

    def __init__(self, engines: object) -> None:
        self.board = MetricsBoard()

    async def take(self, engine: str, exposition: bytes) -> None:
        """The metrics of an engine."""
        self.board.put(engine, exposition)


def front_builder(server: ServerConfig) -> Callable[[], ASGIApp]:
    """What makes the front in the process that it runs in."""

    def build() -> ASGIApp:
        return Gate(Front(forward, expositions, server), server)

    return build


async def forward(key: str, call: Call) -> AsyncGenerator[Message]:
    """A call goes to an engine by a handle of Ray Serve; see `Front`."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    engines = serve.get_deployment_handle(ENGINES, APP).options(stream=True)
    messages = engines.forward.remote(key, call)
    try:
        async for message in messages:
            yield message
    except RayActorError as error:
        raise ReplicaDiedError from error
    except BackPressureError as error:
        raise OverloadedError from error
    finally:
        messages.cancel()  # nothing, where it has come to its end


def expositions() -> Sequence[bytes]:
    """What engines have told the front in whose process this is called."""
    from ray import serve

    front = serve.get_replica_context().servable_object
    assert isinstance(front, FrontReplica), "nobody else calls it"
    return front.board.newest()


def address_of(server: ServerConfig) -> str:
    """Where clients find it."""
    host = server.host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
