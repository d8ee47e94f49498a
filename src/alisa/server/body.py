"""The JSON body of a call: bounded in size and time, strict JSON, checked against its model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from alisa.server.errors import ApiError, bad_request

Model = TypeVar("Model", bound=BaseModel)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_body(request: Request, model: type[Model], *, max_bytes: int, timeout_s: float) -> Model:
    """The body of a call as `model` describes it.

    Raises:
        ApiError: it is of another type, too large, too slow, no JSON, or not as the model wants it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON, and say so: Content-Type: application/json.")
    return _checked(_parsed(await receive_body(request, max_bytes=max_bytes, timeout_s=timeout_s)), model)


async def receive_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """All bytes of the body.

    Raises:
        ApiError: it is too large or too slow, or the client has left in the middle of it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _received(request, max_bytes)
    except TimeoutError as error:
        raise ApiError(408, f"The body was not here within {timeout_s:g} seconds.") from error


async def _received(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    data = bytearray()
    if not announced.isdecimal() or int(announced) <= max_bytes:
        try:
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    break
            else:
                return bytes(data)
        except ClientDisconnect as error:
            raise ApiError(400, "The client has left before its body was here.") from error
    raise ApiError(413, f"The body is larger than {max_bytes} bytes, which is the limit here.")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no character
    except (ValueError, RecursionError) as error:
        # The error of the parser may quote the body.
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise bad_request(f"The body is not valid JSON{where} (UTF-8, no NaN, no Infinity, not too deep).") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _checked(value: dict[str, Any], model: type[Model]) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # Without the input: it may be a prompt, and messages are logged.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Only the field: what follows names types that no client knows.
        param = str(first["loc"][0]) if first["loc"] else None
        raise bad_request(f"{param or 'The body'}: {first['msg']}.", param) from error
