"""What clients of a fleet meet: it reads a call, has a replica picked by how the call begins, and passes its answer on.

It knows nothing of models. Nothing in it needs Ray: `Forward` is what Ray's handle does. What is asked of the fleet as
a whole it answers itself, so that it is answered while every engine is full.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from alisa.config import parse_bytes
from alisa.dist.call import Call
from alisa.dist.metrics import joined
from alisa.dist.routing import routing_key
from alisa.server.app import METRICS_TYPE
from alisa.server.body import receive_body
from alisa.server.config import ServerConfig
from alisa.server.errors import ApiError
from alisa.server.reply import error_reply

_LOG = logging.getLogger("alisa.dist")
_OF_THE_FLEET = frozenset(("/health", "/ready", "/metrics"))


Forward: TypeAlias = Callable[[str, Call], AsyncGenerator[Message]]
"""A routing key and a call to the messages of the replica that answers it."""


class ReplicaDiedError(Exception):
    """The replica died while it answered."""


class OverloadedError(Exception):
    """All replicas are full, and as many calls wait as may."""


class Front:
    """An ASGI application.

    Args:
        forward: to a replica; raises `ReplicaDiedError` and `OverloadedError`.
        expositions: the metrics of the replicas that are there.
        config: of the server.
    """

    def __init__(self, forward: Forward, expositions: Callable[[], Sequence[bytes]], config: ServerConfig) -> None:
        self._forward = forward
        self._expositions = expositions
        self._max_bytes = parse_bytes(config.max_body)
        self._receive_timeout_s = config.receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["method"] == "GET" and scope["path"] in _OF_THE_FLEET:
            await self._of_fleet(scope["path"])(scope, receive, send)
            return
        try:
            body = await receive_body(
                Request(scope, receive), max_bytes=self._max_bytes, timeout_s=self._receive_timeout_s
            )
        except ApiError as refusal:  # half a body, where the client has left: no replica hears of it
            await error_reply(refusal)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = Call(scope["method"], scope["path"], scope["query_string"], tuple(scope["headers"]), body)
        await self._answer(call, routing_key(headers, body), scope, receive, send)

    def _of_fleet(self, path: str) -> Response:
        """Whether this front lives, whether any engine does, and what they count."""
        if path == "/health":
            return JSONResponse({"status": "ok"})
        expositions = self._expositions()
        if path == "/metrics":
            return Response(joined(expositions), media_type=METRICS_TYPE)
        if expositions:
            return JSONResponse({"ready": True})
        return error_reply(ApiError(503, "There is no engine.", kind="service_unavailable_error"))

    async def _answer(self, call: Call, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        started: Message | None = None
        try:
            async with aclosing(self._forward(key, call)) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        started = message
                    await send(message)
        except (ReplicaDiedError, OverloadedError) as error:
            told = _told(error)
            if started is None:
                await error_reply(told)(scope, receive, send)
            elif _is_event_stream(started):
                # A stream that merely ends would look like a short text.
                data = json.dumps(told.body).encode()
                await send({"type": "http.response.body", "body": b"data: " + data + b"\n\ndata: [DONE]\n\n"})
            else:
                raise  # the connection breaks off, which no client takes for an answer


def _told(error: Exception) -> ApiError:
    if isinstance(error, OverloadedError):
        return ApiError(
            429,
            "All engines are full, and as many calls wait as may; come back later.",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
        )
    _LOG.error("a replica died while it answered a call")
    return ApiError(
        503, "The engine that worked on this has died; another takes its place.", kind="service_unavailable_error"
    )


def _is_event_stream(start: Message) -> bool:
    return Headers(raw=[*start["headers"]]).get("content-type", "").startswith("text/event-stream")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
