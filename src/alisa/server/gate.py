"""Who may come in: calls by a known name of this server, with its key. What is open to all tells nothing of anybody."""

from __future__ import annotations

import hashlib
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from alisa.server.config import ServerConfig
from alisa.server.errors import ApiError

OPEN_PATHS = frozenset(("/", "/health", "/ready"))
"""The page itself is the same for everybody; what it shows it has to ask for."""


class Gate:
    """Stands before an application.

    Args:
        app: the application.
        config: names and keys of the server. `request.state.client` says which key a call came with.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._known_hosts = config.known_hosts
        self._keys = [_digest(key) for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a call in, or say why not."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["client"] = client = self._client(scope)
            refusal = self._refusal(scope, client)
            if refusal is not None:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _client(self, scope: Scope) -> str | None:
        """Who calls, by the key that is sent; None: nobody who has one. Without keys all are one."""
        if not self._keys:
            return ""
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        sent = _digest(token.strip())
        # Every key is compared, so that the time says nothing about which.
        found = [secrets.compare_digest(sent, key) for key in self._keys]
        return f"key-{found.index(True)}" if True in found else None

    def _refusal(self, scope: Scope, client: str | None) -> ApiError | None:
        headers = Headers(scope=scope)
        host = _without_port(headers.get("host", ""))
        if self._known_hosts is not None and host not in self._known_hosts:
            return ApiError(
                421, f"This server is not called {host[:100]!r}; start it with --allowed-hosts if it is.", param="Host"
            )
        if client is not None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        return ApiError(401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
