"""POST /v1/completions: texts that are continued."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alisa.config import SamplingParams
from alisa.outputs import RequestOutput, TextDelta, TokenLogprob
from alisa.server.errors import bad_request
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
        return EventStream(completion.events(texts), texts, send_timeout_s=service.config.send_timeout_s)
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
        outputs = [self._cut(output) for output in await texts.outputs()]
        usage = Usage.of(self.prompts, outputs)
        return self._body([self._choice(number, output) for number, output in enumerate(outputs)], usage.body)

    async def events(self, texts: Texts) -> AsyncGenerator[dict[str, Any]]:
        """The reply as it grows."""
        usage = Usage.of(self.prompts)

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            return self._body(
                [choice], usage.body if self.call.tells_usage_always else None, told=self.call.tells_usage
            )

        lengths = [0] * (len(self.prompts) * self.params.n)
        begun: set[int] = set()
        async for number, event in texts.events():
            if isinstance(event, TextDelta):
                tokens = () if self.call.max_tokens == 0 else event.token_ids
                usage.completion_tokens += len(tokens)
                head = self._echoed(number) if self.call.echo and number not in begun else ""
                text = head + ("" if self.call.max_tokens == 0 else event.text)
                logprobs = self._logprobs(event.logprobs, lengths[number] + len(head))
                choice: dict[str, Any] = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": None}
                if self.call.return_token_ids:
                    choice["token_ids"] = list(tokens)
                    choice["prompt_token_ids"] = None if number in begun else self._prompt(number)
                begun.add(number)
                lengths[number] += len(text)
                yield chunk(choice)
            else:
                output = self._cut(event)
                usage.cached_tokens += 0 if number % self.params.n else event.report.cached_tokens
                ended = {"finish_reason": finish_reason(output), "stop_reason": output.stop_reason}
                yield chunk({"index": number, "text": "", "logprobs": None, **ended})
        if self.call.tells_usage:
            yield self._body([], usage.body)

    def nothing(self) -> dict[str, Any]:
        """The reply to a call that asks for no token."""
        choices = [
            {"index": number, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}
            for number in range(len(self.prompts) * self.params.n)
        ]
        return self._body(choices, Usage.of(self.prompts).body)

    def _body(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, *, told: bool = False
    ) -> dict[str, Any]:
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
        head = self._echoed(number) if self.call.echo else ""
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

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if self.call.logprobs is None or self.call.max_tokens == 0:
            return None
        return completion_logprobs(self.service.model.tokenizer, tokens, offset=offset)

    def _cut(self, output: RequestOutput) -> RequestOutput:
        """Without the token that the engine had to make for a call that wants none."""
        if self.call.max_tokens != 0:
            return output
        logprobs = None if output.logprobs is None else ()
        return replace(output, text="", token_ids=(), logprobs=logprobs, finish_reason="length", stop_reason=None)

    def _prompt(self, number: int) -> list[int]:
        return self.prompts[number // self.params.n]

    def _echoed(self, number: int) -> str:
        """The prompt as the client sent it, or as its tokens are written."""
        given, place = self.call.prompt, number // self.params.n
        if isinstance(given, str):
            return given
        one = given[place] if not isinstance(given[0], int) else None
        if isinstance(one, str):
            return one
        token_bytes = self.service.model.tokenizer.token_bytes
        return b"".join(token_bytes[token_id] for token_id in self._prompt(number)).decode(errors="replace")
