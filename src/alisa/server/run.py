"""From a configuration to a server that runs, until it is told to stop or its engine fails."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import time

import uvicorn

from alisa.config import EngineConfig
from alisa.engine.async_engine import AsyncEngine
from alisa.engine.budgets import RequestBudgets
from alisa.engine.builder import build_engine
from alisa.engine.engine import Engine
from alisa.engine.loaded import LoadedModel, load_model
from alisa.engine.report import EngineSetup
from alisa.engine.threads import run_apart
from alisa.errors import InputError
from alisa.server.app import make_app
from alisa.server.config import ServerConfig
from alisa.server.connection import GuardedConnection
from alisa.server.service import ServedModel, Service, served_name
from alisa.server.telemetry import Telemetry

_LOG = logging.getLogger("alisa.server")
WATCH_S = 0.25
"""How often the engine's thread is looked after, and the event loop's lag is measured."""


def build_service(
    engine_config: EngineConfig,
    config: ServerConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    capped: Callable[[EngineConfig, int], EngineConfig] = lambda config, weight_bytes: config,
    engine_name: str = "0",
) -> Service:
    """A model that is loaded, with an engine that runs.

    Args:
        engine_config: of the engine.
        config: of the server.
        progress: called with (bytes read, bytes in all) while weights load.
        capped: `engine_config` and the bytes of the weights to the configuration that the engine has.
        engine_name: the label `engine` of its metrics.

    Raises:
        AlisaError: the model or the engine cannot be had.
    """

    def build() -> tuple[LoadedModel, Engine, EngineSetup]:
        loaded = load_model(engine_config, progress)
        return loaded, *build_engine(loaded, capped(engine_config, loaded.decoder.weight_bytes))

    loaded, engine, setup = run_apart(build)  # the engine has a thread of its own, and so the processors
    assert loaded.tokenizer is not None, "a model that was loaded from files has one"
    with suppress(InputError):  # without llguidance a call that wants a form is refused
        engine.prepare_guides()
    model = ServedModel(
        name=served_name(engine_config, config.served_model_name),
        root=loaded.name,
        tokenizer=loaded.tokenizer,
        sampling=loaded.sampling,
        max_model_len=engine.max_model_len,
        num_layers=loaded.spec.num_layers,
        config=engine_config,
        budgets=RequestBudgets(engine_config, on_cpu=loaded.decoder.device.type == "cpu"),
        created_s=int(time()),
    )
    telemetry = Telemetry(model.name, setup.device_bytes, engine=engine_name)
    return Service(model, AsyncEngine(engine, telemetry.observe), telemetry, config)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """In the block the garbage collector passes over all that was there before: for a process that only serves.

    A model, an application and their libraries are hundreds of thousands of objects. To look at them takes a tenth of a
    second, in which neither the engine nor the event loop does anything.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # what is never looked at is not taken down in order at the end


async def serve(server: ApiServer) -> int:
    """Answer calls until a signal says stop; returns the exit status: 1 when the engine has failed.

    SIGTERM and SIGINT drain: nobody new comes in, and running calls come to their end, within a time.

    Raises:
        InputError: the address cannot be listened on.
    """
    service, config = server.service, server.service.config
    watcher = asyncio.create_task(_watch(server))
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it could not listen
        raise InputError(
            f"{config.host} port {config.port} cannot be listened on; the line above says why. Try another --port."
        ) from error
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        await service.engine.close()
    return 1 if service.engine.failure is not None else 0


class ApiServer(uvicorn.Server):
    """Answers calls. Setting `should_exit` does what SIGTERM does.

    Args:
        service: what answers them, and where to listen.
        started: called with the address, once calls are answered.
    """

    def __init__(self, service: Service, started: Callable[[str], object]) -> None:
        self.service = service
        config = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service, config),
                host=config.host.strip("[]"),
                port=config.port,
                http=GuardedConnection,
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=int(config.drain_timeout_s) + 10,  # `_watch` is first
            )
        )
        self._announce = started

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say so."""
        await super().startup(None)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")


async def _watch(server: ApiServer) -> None:
    """A server without an engine ends; one that ends brings its calls to their end in time. Tells how late it wakes."""
    engine, loop = server.service.engine, asyncio.get_running_loop()
    while engine.failure is None and not server.should_exit:
        due_s = loop.time() + WATCH_S
        await asyncio.sleep(WATCH_S)
        server.service.telemetry.observe_lag(max(loop.time() - due_s, 0.0))
    if engine.failure is not None:
        _LOG.error("the engine has failed; the server ends", exc_info=engine.failure)
        await asyncio.sleep(1.0)  # whoever asks hears of it
        server.should_exit = True
        return
    await asyncio.sleep(server.service.config.drain_timeout_s)
    await engine.close()  # who is still here is told
