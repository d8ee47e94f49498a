"""How replies leave: plain ones only while somebody waits for them, streams as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from time import monotonic
from typing import Any, TypeVar

import pydantic_core
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from alisa.server.errors import ApiError, as_api_error

T = TypeVar("T")
_LOG = logging.getLogger("alisa.server")

PING_S = 15.0
"""A stream that has nothing to say for this long sends a comment, so that nobody between takes it for dead."""
CLIENT_LEFT = 499
"""nginx's status for it; nobody reads it."""


def to_json(value: object) -> bytes:
    """Compact JSON as UTF-8, of dataclasses too; `json` takes several times as long."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


def error_reply(error: Exception, *, prompt_param: str = "prompt") -> Response:
    """An error in OpenAI's form; what is our fault goes to the log too."""
    told = as_api_error(error, prompt_param=prompt_param)
    _log(error, told)
    return JSONResponse(told.body, told.status, told.headers)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, unless the client leaves: then it is cancelled.

    Raises:
        ApiError: the client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(CLIENT_LEFT, "The client has left.")
    finally:
        await _cancelled(working, leaving)


class EventStream(Response):
    """Server-sent events.

    The client that leaves, or that takes nothing for too long, ends the work behind them.

    Args:
        events: JSON objects; an error in it becomes the last event.
        source: what they come from; left whatever happens.
        send_timeout_s: how long a client may take nothing.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Mapping[str, Any]],
        source: AbstractAsyncContextManager[object],
        *,
        send_timeout_s: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source
        self._send_timeout_s = send_timeout_s
        self._sent_s = 0.0
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as somebody takes."""
        async with self._source:
            works = self._send_all(send), _until_gone(receive), self._watch(send)
            tasks = [asyncio.ensure_future(work) for work in works]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _cancelled(*tasks)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, b"data: " + to_json(event) + b"\n\n")
        except OSError:
            raise
        except Exception as error:
            # A stream that merely ends would look like a short text.
            told = as_api_error(error)
            _log(error, told)
            await self._send(send, b"data: " + to_json(told.body) + b"\n\n")
        await self._send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, send: Send) -> None:
        """Ends when the client has taken nothing for too long; pings when there was nothing to take."""
        self._sent_s = monotonic()
        while not self._is_sending or monotonic() < self._sent_s + self._send_timeout_s:
            await asyncio.sleep(min(PING_S, self._send_timeout_s) / 4)
            if not self._is_sending and monotonic() > self._sent_s + PING_S:
                await self._send(send, b": ping\n\n")

    async def _send(self, send: Send, data: bytes) -> None:
        # A time-out around each of them would cost as much as sending it: `_watch` looks at the clock.
        self._sent_s, self._is_sending = monotonic(), True
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_sending = False


def _log(error: Exception, told: ApiError) -> None:
    """What is our fault is to be found in the log, of what nobody expected with the way that led to it."""
    if told.status == 500:
        _LOG.error("a call failed: %s", told.message, exc_info=None if error is told else error)


async def _until_gone(receive: Receive) -> None:
    """The client has left; its body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """The tasks are over, whatever came of them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
