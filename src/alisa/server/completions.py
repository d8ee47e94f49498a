"""POST /v1/completions: texts that are continued."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alisa.config import SamplingParams
from alisa.engine.inbox import Event
from alisa.outputs import RequestOutput, TextDelta, TokenLogprob
from alisa.server.errors import bad_request
from alisa.server.frames import TextFrames, to_frame
from alisa.server.logprobs import completion_logprobs, prompt_logprobs
from alisa.server.params import check_model, completion_params, reading_params
from alisa.server.protocol import CompletionRequest, GenerationRequest
from alisa.server.reply import EventStream, while_connected
from alisa.server.service import Service, Texts
from alisa.server.usage import Usage, finish_reason


async def complete(request: Request, call: CompletionRequest, service: Service) -> Response:
    """The texts, at once or as a stream.

    Raises:
        ApiError: the call cannot be answered.
        AlisaError: the same, in the engine's words.
    """
    model = service.model
    check_model(call.model, model.name)
    params = completion_params(call, model.sampling, model.config)
    reading = reading_params(call, model.budgets)
    if call.stream and call.echo and call.logprobs is not None:
        raise bad_request("echo with logprobs is not streamed; leave stream out.", "stream")
    prompts = [truncated(call, ids, model.max_model_len) for ids in await _prompt_ids(call, service)]
    completion = _Completion(call, prompts, params, service, f"cmpl-{uuid.uuid4().hex}", int(time()))
    if call.max_tokens == 0 and not call.echo:
        return JSONResponse(completion.nothing())
    texts = await service.start(
        prompts,
        params,
        priority=call.priority or 0,
        cache_salt=call.cache_salt or "",
        client=request.state.client,
        reading=reading,
    )
    if call.stream:
        return EventStream(_CompletionFrames(completion), texts, send_timeout_s=service.config.send_timeout_s)
    async with texts:
        return JSONResponse(await while_connected(request, completion.whole(texts)))


def truncated(call: GenerationRequest, ids: list[int], max_model_len: int) -> list[int]:
    """The last tokens of a prompt, where the call asks for a limit; -1 means the model's."""
    limit = call.truncate_prompt_tokens
    if limit is None:
        return ids
    return ids[-(max_model_len - 1 if limit == -1 else max(limit, 1)) :]


async def _prompt_ids(call: CompletionRequest, service: Service) -> list[list[int]]:
    """Token ids of every prompt of a call."""
    special = call.add_special_tokens is not False
    given = call.prompt
    if isinstance(given, str):
        return [await service.encode(given, special_tokens=special)]
    if not given:
        raise bad_request("prompt is an empty list; give at least one.", "prompt")
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    if len(given) > service.config.max_choices:
        raise bad_request(
            f"prompt is a list of {len(given)}; this server takes {service.config.max_choices} in one call.", "prompt"
        )
    return [
        await service.encode(one, special_tokens=special) if isinstance(one, str) else one
        for one in given
        if not isinstance(one, int)
    ]


@dataclass(frozen=True, slots=True)
class _Completion:
    """One call while it is answered."""

    call: CompletionRequest
    prompts: Sequence[list[int]]
    params: SamplingParams
    service: Service
    name: str
    created_s: int

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The reply when all texts are at their end."""
        outputs = [self.cut(output) for output in await texts.outputs()]
        usage = Usage.of(self.prompts, outputs)
        return self.body([self._choice(number, output) for number, output in enumerate(outputs)], usage.body)

    def nothing(self) -> dict[str, Any]:
        """The reply to a call that asks for no token."""
        choices = [
            {"index": number, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
            for number in range(len(self.prompts) * self.params.n)
        ]
        return self.body(choices, Usage.of(self.prompts).body)

    def body(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, *, told: bool = False
    ) -> dict[str, Any]:
        """What every object of the reply has, and these choices."""
        body: dict[str, Any] = {
            "id": self.name,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.service.model.name,
            "choices": choices,
        }
        return body | ({"usage": usage} if told or usage is not None else {})

    def _choice(self, number: int, output: RequestOutput) -> dict[str, Any]:
        tokenizer = self.service.model.tokenizer
        head = self.echoed(number) if self.call.echo else ""
        logprobs = None
        if self.call.logprobs is not None:
            before = output.prompt_logprobs or () if self.call.echo else ()
            first_id = output.prompt_ids[0] if self.call.echo else None
            found = (*before, *(output.logprobs or ()))
            logprobs = completion_logprobs(tokenizer, found, offset=0, first_id=first_id)
        choice: dict[str, Any] = {
            "index": number,
            "text": head + output.text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(output),
            "stop_reason": output.stop_reason,
        }
        if self.call.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(tokenizer, output.prompt_logprobs or ())
        if self.call.return_token_ids:
            choice |= {"token_ids": list(output.token_ids), "prompt_token_ids": list(output.prompt_ids)}
        return choice

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """Those of tokens whose text begins at this character; None: nobody asked."""
        if self.call.logprobs is None or self.call.max_tokens == 0:
            return None
        return completion_logprobs(self.service.model.tokenizer, tokens, offset=offset)

    def cut(self, output: RequestOutput) -> RequestOutput:
        """Without the token that the engine had to make for a call that wants none."""
        if self.call.max_tokens != 0:
            return output
        logprobs = None if output.logprobs is None else ()
        return replace(output, text="", token_ids=(), logprobs=logprobs, finish_reason="length", stop_reason=None)

    def prompt(self, number: int) -> list[int]:
        """Of the text with this number."""
        return self.prompts[number // self.params.n]

    def echoed(self, number: int) -> str:
        """The prompt as the client sent it, or as its tokens are written."""
        given, place = self.call.prompt, number // self.params.n
        if isinstance(given, str):
            return given
        one = given[place] if not isinstance(given[0], int) else None
        if isinstance(one, str):
            return one
        token_bytes = self.service.model.tokenizer.token_bytes
        return b"".join(token_bytes[token_id] for token_id in self.prompt(number)).decode(errors="replace")


class _CompletionFrames:
    """The frames of a call that is streamed, one for each event of its texts."""

    def __init__(self, completion: _Completion) -> None:
        self.usage = Usage.of(completion.prompts)
        self._completion = completion
        self._call = call = completion.call
        self._lengths = [0] * (len(completion.prompts) * completion.params.n)
        self._begun: set[int] = set()
        # After the first event of a text, those of a plain call differ in what they say alone.
        self._is_plain = not (
            call.logprobs is not None or call.return_token_ids or call.tells_usage_always or call.max_tokens == 0
        )
        self._plain: dict[int, TextFrames] = {}

    def frame(self, number: int, event: Event) -> bytes:
        """What a client is told of this event of text `number`.

        Raises:
            ApiError: the text has ended in an error.
        """
        if not isinstance(event, TextDelta):
            return to_frame(self._ended(number, event))
        if number in self._plain:
            self.usage.completion_tokens += len(event.token_ids)
            return self._plain[number].write(event.text)
        frame = to_frame(self._grown(number, event))
        if self._is_plain:
            self._plain[number] = TextFrames(lambda text: self._chunk(self._choice(number, text)))
        return frame

    def closing(self) -> bytes:
        """The usage, where it is asked for."""
        return to_frame(self._completion.body([], self.usage.body)) if self._call.tells_usage else b""

    def _grown(self, number: int, event: TextDelta) -> dict[str, Any]:
        call, completion = self._call, self._completion
        tokens = () if call.max_tokens == 0 else event.token_ids
        self.usage.completion_tokens += len(tokens)
        head = completion.echoed(number) if call.echo and number not in self._begun else ""
        text = head + ("" if call.max_tokens == 0 else event.text)
        choice = self._choice(number, text)
        choice["logprobs"] = completion.logprobs(event.logprobs, self._lengths[number] + len(head))
        if call.return_token_ids:
            choice["token_ids"] = list(tokens)
            choice["prompt_token_ids"] = None if number in self._begun else completion.prompt(number)
        self._begun.add(number)
        self._lengths[number] += len(text)
        return self._chunk(choice)

    def _ended(self, number: int, event: RequestOutput) -> dict[str, Any]:
        output = self._completion.cut(event)
        self.usage.cached_tokens += 0 if number % self._completion.params.n else event.report.cached_tokens
        ended = {"finish_reason": finish_reason(output), "stop_reason": output.stop_reason}
        return self._chunk(self._choice(number, "") | ended)

    def _choice(self, number: int, text: str) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": None, "finish_reason": None}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = self.usage.body if self._call.tells_usage_always else None
        return self._completion.body([choice], usage, told=self._call.tells_usage)
