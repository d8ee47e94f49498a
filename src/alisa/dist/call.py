"""An HTTP call on its way from the front to a replica, and the application there that answers it message by message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope


@dataclass(frozen=True, slots=True)
class Call:
    """A call with its whole body, as plain values that travel."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def scope(self) -> Scope:
        """As ASGI describes it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": [*self.headers],
            "client": None,
            "server": None,
            "state": {},
        }


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """What the application sends. Closing the generator is the client's leaving: the work behind it ends."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    body: Message | None = {"type": "http.request", "body": call.body, "more_body": False}

    async def receive() -> Message:
        nonlocal body
        if body is None:
            await asyncio.Event().wait()  # who leaves cancels the task
        message, body = body, None
        assert message is not None, "the body comes once"
        return message

    async def send(message: Any) -> None:  # noqa: ANN401 - of ASGI
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await app(call.scope, receive, send)
        finally:
            sent.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            yield message
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
