"""Errors as OpenAI's clients expect them: a status, and an object with a message, a type, a parameter and a code."""

from __future__ import annotations

from typing import Any

from alisa.engine.async_engine import EngineClosedError, EngineDiedError
from alisa.errors import AlisaError, CapacityError, RequestError

RETRY_AFTER_S = 1
"""When to come back, where nothing better is known: official clients wait this long, and then longer each time."""


class ApiError(Exception):
    """What a client is told in place of a result.

    Args:
        status: of HTTP.
        message: one sentence; never a part of a prompt.
        kind: OpenAI's `type`.
        param: the field that is to blame.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client can mend it."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception, *, prompt_param: str = "prompt") -> ApiError:
    """What a client is told of an error; of one of ours nothing but that there was one.

    Args:
        error: what was raised.
        prompt_param: how the call names its prompt.
    """
    match error:
        case ApiError():
            return error
        case EngineDiedError() | EngineClosedError():
            return ApiError(503, "The engine has stopped; this server will end.", kind="service_unavailable_error")
        case RequestError():
            code = "context_length_exceeded" if "positions" in error.problem else None
            return bad_request(str(error), prompt_param, code)
        case CapacityError():
            return bad_request(str(error), "max_tokens", "context_length_exceeded")
        case AlisaError():
            return bad_request(str(error))
        case _:
            return ApiError(500, "The server has failed; its log says how.", kind="internal_error")
