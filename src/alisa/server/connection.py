"""One connection: as uvicorn speaks HTTP with httptools, and in addition no head of a call may be slow or endless.

Nor does one stay whose client takes nothing of what it has asked for: a plain close would wait for it for ever, with
all that is not sent yet in memory, and an ending server with it.

An application may borrow its `express`: a way to send pieces of a reply from any callback of the event loop, where ASGI
would want a task to be woken for each; and its `drop`, which ends it whatever is not sent yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

EXPRESS = "alisa.express"
"""Name of the extension in the scope of a call, whose `write` is an `Express`; its `drop` takes and returns nothing."""

Express = Callable[[bytes | bytearray], bool]
"""Sends a piece of the reply, not empty, after its head and before its end; False: not now, the client is slow or has
left. ASGI's own `send` waits for a slow one."""

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
"""As `ServerConfig.receive_timeout_s` is by default; uvicorn makes these objects, so that it cannot be told."""
TAKE_TIMEOUT_S = 30.0
"""As `ServerConfig.send_timeout_s` is by default: that of streams, which look at the time themselves."""


class GuardedConnection(HttpToolsProtocol):
    """Closed when a head is not whole in time, or has too many bytes, or nothing of what is to be sent is taken."""

    _timer: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head must come soon."""
        super().connection_made(transport)
        self._expect_head()
        self._expect_taking(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._head_is_here()
        if self._taking is not None:
            self._taking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What comes between two calls is the head of another one."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._timer is None:
            self._expect_head()
        super().data_received(data)

    def on_url(self, url: bytes) -> None:
        """Count it."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count it."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._head_is_here()
        super().on_headers_complete()
        # The call itself begins when the loop comes to it.
        self.scope["extensions"] = {EXPRESS: {"write": partial(self._write, self.cycle), "drop": self.transport.abort}}

    def _write(self, cycle: RequestResponseCycle, data: bytes | bytearray) -> bool:
        """See `Express`."""
        has_begun = cycle.chunked_encoding and not cycle.response_complete
        if not has_begun or self.flow.write_paused or cycle.disconnected or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _count(self, *parts: bytes) -> None:
        self._head_bytes += sum(map(len, parts))
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    def _expect_taking(self, num_bytes: int) -> None:
        """Look later whether the client has taken some of the bytes that wait for it now."""
        self._taking = self.loop.call_later(TAKE_TIMEOUT_S, self._look_at_taking, num_bytes)

    def _look_at_taking(self, waiting_before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        # More than before is no sign of life: `write` adds to what waits.
        if 0 < waiting_before <= waiting:
            self.transport.abort()
        else:
            self._expect_taking(waiting)

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _head_is_here(self) -> None:
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
