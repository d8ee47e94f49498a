"""How replies leave: plain ones only while somebody waits for them, streams as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from time import monotonic
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from alisa.engine.inbox import Event
from alisa.outputs import RequestOutput
from alisa.server.connection import EXPRESS, Express
from alisa.server.errors import ApiError, as_api_error
from alisa.server.frames import LAST_FRAME, PING_FRAME, to_frame
from alisa.server.service import Texts

T = TypeVar("T")
_LOG = logging.getLogger("alisa.server")

PING_S = 15.0
"""A stream that has nothing to say for this long sends a comment, so that nobody between takes it for dead."""
CLIENT_LEFT = 499
"""nginx's status for it; nobody reads it."""


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


class Frames(Protocol):
    """Writes what a client is told of texts, in the order in which it happened."""

    def frame(self, number: int, event: Event) -> bytes:
        """The server-sent event for an event of text `number`.

        Raises:
            ApiError: the text has ended in an error.
        """

    def closing(self) -> bytes:
        """What comes after all of them."""


class EventStream(Response):
    """Server-sent events.

    The client that leaves, or that takes nothing for too long, ends the texts behind them. What one step gives to them
    leaves in one piece, at once: where the connection lends its `express`, from the very call that brings it, without
    waking this stream's tasks. What comes while a client takes nothing waits, and leaves in one piece too.

    Args:
        frames: what is said; an error in it becomes the last event.
        texts: of whom; left whatever happens.
        send_timeout_s: how long a client may take nothing.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: Frames, texts: Texts, *, send_timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._texts = texts
        self._num_open = len(texts)
        self._send_timeout_s = send_timeout_s
        self._sent_s = 0.0
        self._is_sending = False
        self._express: Express = _no_express
        self._waiting = bytearray()
        self._error: Exception | None = None
        self._news = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as somebody takes."""
        lent = scope.get("extensions", {}).get(EXPRESS, {})
        async with self._texts:
            with self._texts.reading(self):
                watching = asyncio.ensure_future(self._watch())
                works = self._send_all(send, lent.get("write", _no_express)), _until_gone(receive)
                tasks = [watching, *map(asyncio.ensure_future, works)]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    if watching.done():
                        lent.get("drop", _keep)()
                finally:
                    await _cancelled(*tasks)

    def put(self, events: Sequence[Event]) -> None:
        """See `Listener`: the client has them, or they wait for it."""
        if self._error is not None:
            return
        data = bytearray()
        try:
            for event in events:
                data += self._frames.frame(self._texts.number(event), event)
                self._num_open -= isinstance(event, RequestOutput)
        except Exception as error:
            self._error = error
        if data and (self._is_sending or self._waiting or not self._express(data)):
            self._waiting += data
        else:
            self._sent_s = monotonic()
        if self._waiting or self._is_over:
            self._news.set()

    def fail(self, error: Exception) -> None:
        """See `Listener`: the client is told."""
        self._error = error
        self._news.set()

    @property
    def _is_over(self) -> bool:
        return self._error is not None or not self._num_open

    async def _send_all(self, send: Send, express: Express) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._express = express
        while self._waiting or not self._is_over:
            if self._waiting:
                data, self._waiting = self._waiting, bytearray()
                await self._send(send, data)
            else:
                self._news.clear()
                await self._news.wait()
        last = self._frames.closing() if self._error is None else _error_frame(self._error)
        await self._send(send, last + LAST_FRAME, more_body=False)

    async def _watch(self) -> None:
        """Ends when the client has taken nothing for too long; pings when there was nothing to take."""
        self._sent_s = monotonic()
        while not self._is_sending or monotonic() < self._sent_s + self._send_timeout_s:
            await asyncio.sleep(min(PING_S, self._send_timeout_s) / 4)
            if not self._is_sending and monotonic() > self._sent_s + PING_S:
                self._waiting += PING_FRAME
                self._news.set()

    async def _send(self, send: Send, data: bytes | bytearray, *, more_body: bool = True) -> None:
        # A time-out around each of them would cost as much as sending it: `_watch` looks at the clock.
        self._sent_s, self._is_sending = monotonic(), True
        await send({"type": "http.response.body", "body": bytes(data), "more_body": more_body})
        self._is_sending = False


def _error_frame(error: Exception) -> bytes:
    """A stream that merely ends would look like a short text."""
    told = as_api_error(error)
    _log(error, told)
    return to_frame(told.body)


def _no_express(_: bytes | bytearray) -> bool:
    """Of a server that lends none."""
    return False


def _keep() -> None:
    """Of a server that lends no `drop`: it finds out by itself."""


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
