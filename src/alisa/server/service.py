"""The model behind the server: prompts go in, events of any number of texts come out, and nobody asks for too much."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alisa.config import EngineConfig, SamplingParams, per_request, sample_params
from alisa.engine.async_engine import AsyncEngine
from alisa.engine.budgets import AS_CONFIGURED, ReadingParams, RequestBudgets
from alisa.engine.inbox import Event, Listener
from alisa.engine.status import EngineStatus
from alisa.errors import InputError
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import RequestOutput
from alisa.server.config import ServerConfig
from alisa.server.errors import ApiError, bad_request
from alisa.server.telemetry import Telemetry
from alisa.server.usage import finish_reason


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served."""

    name: str
    """For clients."""
    root: str
    """As it was asked for."""
    tokenizer: Tokenizer
    sampling: Mapping[str, float]
    """What its files say of how to sample from it."""
    max_model_len: int
    num_layers: int
    config: EngineConfig
    budgets: RequestBudgets
    """What calls may ask for of how much is read."""
    created_s: int
    """When the server started, in seconds since 1970."""


def served_name(config: EngineConfig, asked: str | None) -> str:
    """The model's name for clients: as asked, or the last part of its path without the ending of a file."""
    if asked:
        return asked
    if config.model is None:
        return "embedded"
    path = Path(config.model)
    return path.stem if path.suffix == ".gguf" else path.name or config.model


class Service:
    """Hands texts to the engine.

    Args:
        model: what is served.
        engine: runs it.
        telemetry: what the engine has told.
        config: how much may be asked for.
    """

    def __init__(self, model: ServedModel, engine: AsyncEngine, telemetry: Telemetry, config: ServerConfig) -> None:
        self.model = model
        self.engine = engine
        self.telemetry = telemetry
        self.config = config
        self._num_open = 0

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests."""
        return self.engine.failure is None

    async def status(self) -> EngineStatus:
        """What the engine is doing."""
        return await self.engine.between_steps(lambda engine: engine.status())

    async def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        # A long one takes its time, and the loop serves others.
        return await asyncio.to_thread(self.model.tokenizer.encode, text, special_tokens=special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation in the model's own format.

        Raises:
            ApiError: the model has no template, or it refuses the messages.
        """
        try:
            return await asyncio.to_thread(
                self.model.tokenizer.encode_chat,
                messages,
                tools=tools,
                template_kwargs=template_kwargs,
                add_generation_prompt=add_generation_prompt,
            )
        except InputError as error:
            raise bad_request(str(error), "messages") from error

    async def start(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        continues: bool = False,
        client: str = "",
        reading: ReadingParams = AS_CONFIGURED,
    ) -> Texts:
        """All texts are queued, or none is: `n` for each prompt, those of one prompt one after the other.

        As with `LLM.generate`: prompt i has seed + i, and the texts of a prompt have seeds of their own. The
        others are those of `Engine.add_request`.

        Raises:
            ApiError: there are too many of them, or the engine has no room for more.
            AlisaError: a prompt or the parameters cannot be used.
        """
        each = [
            (prompt, sample_params(per_request(params, number), sample))
            for number, prompt in enumerate(prompts)
            for sample in range(params.n)
        ]
        if len(each) > self.config.max_choices:
            raise bad_request(
                f"{len(prompts)} prompts with n = {params.n} are {len(each)} texts; this server takes "
                f"{self.config.max_choices} in one call.",
                "n" if params.n > 1 else "prompt",
            )
        most = self.model.config.max_num_seqs + self.config.max_waiting
        if self._num_open + len(each) > most:
            raise ApiError(
                429,
                f"{self._num_open} texts are running or waiting, and {most} is the most; come back later.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
            )
        self._num_open += len(each)
        add = partial(
            self.engine.add_request,
            priority=priority,
            cache_salt=cache_salt,
            continues=continues,
            client=client,
            reading=reading,
        )
        added = [asyncio.ensure_future(add(prompt, rules)) for prompt, rules in each]
        try:
            names = await asyncio.gather(*added)
        except BaseException:
            self._num_open -= len(each)
            for task in added:
                task.cancel()
            for result in await asyncio.gather(*added, return_exceptions=True):
                if isinstance(result, str):
                    self.engine.leave(result)
            raise
        return Texts(self, names)

    def left(self, count: int) -> None:
        """So many texts are over."""
        self._num_open -= count


class Texts:
    """Some running texts. Leaving the `async with` block ends those that have not come to their end.

    Args:
        service: what they are of.
        names: of their requests, in order.
    """

    def __init__(self, service: Service, names: Sequence[str]) -> None:
        self._service = service
        self._names = names
        self._numbers = {name: number for number, name in enumerate(names)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without awaiting anything: whoever leaves may have been cancelled.
        for name in self._names:
            self._service.engine.leave(name)
        self._service.left(len(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def number(self, event: Event) -> int:
        """Which text it is of."""
        return self._numbers[event.request_id]

    def reading(self, reader: Listener) -> AbstractContextManager[None]:
        """In the block their events go to the reader; see `AsyncEngine.reading`."""
        return self._service.engine.reading(self._names, reader)

    async def outputs(self) -> list[RequestOutput]:
        """All texts at their end.

        Raises:
            ApiError: one of them ended in an error: it is an error of all.
            EngineDiedError: the engine has ended with an error.
        """
        outputs: dict[int, RequestOutput] = {}
        async with aclosing(self._service.engine.events(*self._names)) as events:
            async for event in events:
                if isinstance(event, RequestOutput):
                    finish_reason(event)
                    outputs[self.number(event)] = event
        return [outputs[number] for number in range(len(self._names))]
