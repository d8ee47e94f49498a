"""The server's application on Ray Serve: engines that come and go with the number of calls, and a front before them.

    client -> Serve's proxy -> front (picks a replica by how the call begins) -> engine replica (the server's own app)

A replica is the whole server of `alisa serve` without its socket, so that every call is answered alike here and there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable

from starlette.types import ASGIApp, Message

from alisa.config import EngineConfig
from alisa.dist.call import Call, answer
from alisa.dist.cluster import ReplicaSize
from alisa.dist.extra import load_ray
from alisa.dist.front import Forward, Front, OverloadedError, ReplicaDiedError
from alisa.dist.share import ReplicaShare
from alisa.server.app import make_app
from alisa.server.config import ServerConfig
from alisa.server.gate import Gate
from alisa.server.run import build_service

APP = "alisa"
ENGINES = "engines"
FRONT = "front"

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
        share.use_threads()
        self._service = build_service(config, server, capped=share.capped)
        self._app = make_app(self._service, server)

    async def forward(self, key: str, call: Call) -> AsyncGenerator[Message]:
        """The messages of the answer.

        Args:
            key: what the router chose this replica by.
            call: of the client.
        """
        async for message in answer(self._app, call):
            yield message

    def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if (failure := self._service.engine.failure) is not None:
            raise RuntimeError("the engine has failed") from failure


def deploy(config: EngineConfig, server: ServerConfig, size: ReplicaSize, *, min_replicas: int) -> None:
    """The fleet answers calls at the address of `server`.

    Args:
        config: of every engine.
        server: where to listen, for whom, and how much anybody may ask for.
        size: the most replicas, and what each may use.
        min_replicas: those that stay when nobody calls.
    """
    load_ray()
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": server.host.strip("[]"), "port": server.port})
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
        request_router_config=RequestRouterConfig(request_router_class="alisa.dist.prefix_router.PrefixRouter"),
        autoscaling_config={
            "min_replicas": min_replicas,
            "initial_replicas": min_replicas,
            "max_replicas": size.num_replicas,
            "target_ongoing_requests": max(1, math.floor(most * TARGET_SHARE)),
        },
    )
    front = serve.deployment(
        serve.ingress(front_builder(server))(),
        name=FRONT,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_CALLS_OF_FRONT,
        graceful_shutdown_timeout_s=server.drain_timeout_s,
    )
    serve.run(front.bind(engines.bind(config, server, size.share)), name=APP, route_prefix="/")


def front_builder(server: ServerConfig) -> Callable[[], ASGIApp]:
    """What makes the front in the process that it runs in."""

    def build() -> ASGIApp:
        return Gate(Front(forwarder(), server), server)

    return build


def forwarder() -> Forward:
    """Calls go to the engines by a handle of Ray Serve."""
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    async def forward(key: str, call: Call) -> AsyncGenerator[Message]:
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

    return forward


def shut_down() -> None:
    """Calls that run come to their end, within the server's time, and the fleet is gone."""
    load_ray()
    from ray import serve

    serve.delete(APP)
    serve.shutdown()


def address_of(server: ServerConfig) -> str:
    """Where clients find it."""
    host = server.host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{server.port}"
