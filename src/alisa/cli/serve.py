"""`alisa serve`: the model behind an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import dataclass, field, replace

from alisa.cli.cluster_options import ServingOptions
from alisa.cli.ray_serve import serve_fleet
from alisa.cli.screen import loading_bar, say
from alisa.config import EngineConfig
from alisa.errors import InputError
from alisa.server.config import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEngine(EngineConfig):
    """Which model is served, how it attends, and how much memory it may use."""

    prefix_cache: bool = True
    # docs/server.md has what this does to the time between two tokens, and what it costs.
    max_step_tokens: int | None = 256


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model to clients of OpenAI's API, with metrics and a page to look at.

    For instance:
      alisa serve
      alisa serve --model DIR --port 8080 --kv-device-memory 2GiB
      alisa serve --ray auto --replicas 8 --port 8080
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once"}'
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    engine: ServedEngine = field(default_factory=ServedEngine)
    fleet: ServingOptions = field(default_factory=ServingOptions)

    def run(self) -> int:
        """Do it; returns the exit status."""
        config = self.server
        if not config.api_key and (keys := os.environ.get("ALISA_API_KEY")):
            config = replace(config, api_key=tuple(keys.split(",")))
        config.refuse_open_door()
        if self.fleet.ray is not None:
            return serve_fleet(self.engine, config, self.fleet)
        if self.fleet != ServingOptions():
            raise InputError("An option says how --ray is to work, and there is no --ray; give it, or leave that out.")
        try:
            # Here and not above: the command line is read without torch, and without the extra.
            from alisa.server.run import ApiServer, build_service, frozen_heap, serve
        except ModuleNotFoundError as error:
            raise InputError(
                f"alisa serve needs {error.name}, which is not installed; pip install 'alisa[server]'."
            ) from error
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        with loading_bar(self.engine.model or "the embedded model", show=sys.stderr.isatty()) as progress:
            service = build_service(self.engine, config, progress)

        def started(address: str) -> None:
            say(f"alisa: {service.model.name} is served on {address} (page: {address}/, API: {address}/v1)")

        server = ApiServer(service, started)
        try:
            with frozen_heap():
                return asyncio.run(serve(server))
        except KeyboardInterrupt:  # uvicorn raises the signal again that it has followed
            return 0
