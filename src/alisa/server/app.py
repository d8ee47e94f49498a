"""The application: which address leads where."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from alisa import __version__
from alisa.config import parse_bytes
from alisa.errors import AlisaError
from alisa.server.body import read_body
from alisa.server.chat import chat, plain_messages
from alisa.server.completions import complete
from alisa.server.config import ServerConfig
from alisa.server.errors import ApiError, bad_request
from alisa.server.frames import to_json
from alisa.server.gate import Gate
from alisa.server.logprobs import token_text
from alisa.server.page import page_reply
from alisa.server.params import check_model
from alisa.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from alisa.server.reply import error_reply
from alisa.server.service import Service

Call = TypeVar("Call", bound=BaseModel)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(service: Service, config: ServerConfig) -> ASGIApp:
    """Everything a client can call, behind the gate."""
    app = FastAPI(title="alisa", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(AlisaError, _tell)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(Exception, _tell)
    _add_calls(app, service, config)
    _add_facts(app, service)
    gated: ASGIApp = Gate(app, config)
    if config.allowed_origins:
        gated = CORSMiddleware(
            gated, allow_origins=config.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return gated


def _add_calls(app: FastAPI, service: Service, config: ServerConfig) -> None:
    """What is sent as JSON."""
    model = service.model
    max_bytes = parse_bytes(config.max_body)

    def post(path: str, kind: type[Call], answer: Callable[[Request, Call], Awaitable[Response]]) -> None:
        async def route(request: Request) -> Response:
            call = await read_body(request, kind, max_bytes=max_bytes, timeout_s=config.receive_timeout_s)
            return await answer(request, call)

        schema = kind.model_json_schema(ref_template=f"#/paths/{path.replace('/', '~1')}/post/x-models/{{model}}")
        models = schema.pop("$defs", {})
        described = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "x-models": models,
        }
        app.add_api_route(
            path, route, methods=["POST"], openapi_extra=described, responses=_REPLIES, summary=kind.__doc__
        )

    async def tokenize(request: Request, call: TokenizeRequest) -> Response:
        check_model(call.model, model.name)
        if (call.prompt is None) == (call.messages is None):
            raise bad_request("Give prompt, or messages.", "prompt")
        if call.messages is not None:
            ids = await service.encode_chat(
                plain_messages(call.messages),
                template_kwargs=call.chat_template_kwargs,
                add_generation_prompt=call.add_generation_prompt is not False,
            )
        else:
            ids = await service.encode(call.prompt or "", special_tokens=call.add_special_tokens is not False)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids}
        texts = [token_text(model.tokenizer, token_id) for token_id in ids] if call.return_token_strs else None
        return JSONResponse(found | {"token_strs": texts})

    async def detokenize(request: Request, call: DetokenizeRequest) -> Response:
        check_model(call.model, model.name)
        if bad := [token_id for token_id in call.tokens if token_id >= model.tokenizer.vocab_size]:
            raise bad_request(
                f"There is no token {bad[0]}; the model knows 0 to {model.tokenizer.vocab_size - 1}.", "tokens"
            )
        return JSONResponse({"prompt": model.tokenizer.decode(call.tokens)})

    post("/v1/completions", CompletionRequest, lambda request, call: complete(request, call, service))
    post("/v1/chat/completions", ChatRequest, lambda request, call: chat(request, call, service))
    post("/tokenize", TokenizeRequest, tokenize)
    post("/detokenize", DetokenizeRequest, detokenize)


def _add_facts(app: FastAPI, service: Service) -> None:
    """What is only asked for."""
    model = service.model
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "alisa",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
    }

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(model_id: str) -> Response:
        check_model(model_id, model.name)
        return JSONResponse(card)

    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def ready() -> Response:
        if service.is_ready:
            return JSONResponse({"ready": True})
        raise ApiError(503, "The engine has stopped.", kind="service_unavailable_error")

    async def version() -> Response:
        return JSONResponse({"version": __version__})

    async def metrics() -> Response:
        return Response(service.telemetry.exposition(await service.status()), media_type=METRICS_TYPE)

    async def tokenizer_info() -> Response:
        tokenizer = model.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": "alisa",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": model.max_model_len,
                "chat_template": tokenizer.chat_template,
                "eos_token_ids": sorted(tokenizer.eos_ids),
                **tokenizer.special_tokens,
            }
        )

    async def state() -> Response:
        telemetry = service.telemetry
        found = {
            "model": {**model.config.describe(), "name": model.name, "max_model_len": model.max_model_len},
            "num_layers": model.num_layers,
            "has_chat": model.tokenizer.has_chat_template,
            "uptime_s": telemetry.uptime_s,
            "status": await service.status(),
            "seconds": telemetry.seconds(),
            "finished": telemetry.finished(),
        }
        # Each page asks for all of it once a second; `asdict` and `json` would hold the event loop up.
        return Response(to_json(found), media_type="application/json")

    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/models/{model_id:path}", one_model, methods=["GET"], responses=_ERRORS)
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET"], responses=_ERRORS)
    app.add_api_route("/version", version, methods=["GET"])
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
    app.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"])
    app.add_api_route("/state", state, methods=["GET"], include_in_schema=False)
    app.add_api_route("/", page_reply, methods=["GET"], include_in_schema=False)


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "The call cannot be answered as it is.",
        401: "The key is missing or wrong.",
        404: "There is no such model.",
        408: "The body was too slow.",
        413: "The body is too large.",
        415: "The body is no JSON.",
        429: "Too many texts are waiting.",
        500: "The server has failed.",
        503: "The engine has stopped.",
    }.items()
}


_REPLIES: dict[int | str, dict[str, Any]] = _ERRORS | {
    200: {"description": "The result; with `stream` its events.", "content": {"text/event-stream": {}}}
}


async def _tell(request: Request, error: Exception) -> Response:
    return error_reply(error, prompt_param="messages" if "chat" in request.url.path else "prompt")


async def _tell_http(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown address, a wrong method."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, str(error.detail) + ".")
    return JSONResponse(told.body, told.status, error.headers)
