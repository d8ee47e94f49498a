"""POST /v1/chat/completions: conversations that are answered."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alisa.config import SamplingParams
from alisa.engine.inbox import Event
from alisa.outputs import RequestOutput, TextDelta
from alisa.server.completions import truncated
from alisa.server.errors import bad_request
from alisa.server.frames import TextFrames, to_frame
from alisa.server.logprobs import chat_logprobs, prompt_logprobs
from alisa.server.params import chat_params, check_model, reading_params
from alisa.server.protocol import ChatRequest, Message
from alisa.server.reply import EventStream, while_connected
from alisa.server.service import Service, Texts
from alisa.server.tools import ToolCall, ToolReader, writes_tool_calls
from alisa.server.usage import Usage, finish_reason

TEXT_PARTS = ("text", "input_text")
"""Types of the parts of a message that are text."""


async def chat(request: Request, call: ChatRequest, service: Service) -> Response:
    """The answers, at once or as a stream.

    Raises:
        ApiError: the call cannot be answered.
        AlisaError: the same, in the engine's words.
    """
    model = service.model
    check_model(call.model, model.name)
    tools = _tools(call, service)
    ids = await service.encode_chat(
        plain_messages(call.messages),
        tools=tools,
        template_kwargs=call.chat_template_kwargs,
        add_generation_prompt=call.add_generation_prompt is not False,
    )
    prompt = truncated(call, ids, model.max_model_len)
    params = chat_params(call, model.sampling, model.config, model.max_model_len - len(prompt))
    answer = _Answer(call, prompt, params, service, f"chatcmpl-{uuid.uuid4().hex}", int(time()), bool(tools))
    texts = await service.start(
        [prompt],
        params,
        priority=call.priority or 0,
        cache_salt=call.cache_salt or "",
        continues=service.config.read_answers and params.n == 1,
        client=request.state.client,
        reading=reading_params(call, model.budgets),
    )
    if call.stream:
        return EventStream(_AnswerFrames(answer), texts, send_timeout_s=service.config.send_timeout_s)
    async with texts:
        return JSONResponse(await while_connected(request, answer.whole(texts)))


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: content is one text, and a developer is the system.

    Raises:
        ApiError: a part of a message is no text.
    """
    found = []
    for message in messages:
        values = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            values["content"] = "".join(_part(part) for part in message.content)
        if message.role == "developer":
            values["role"] = "system"
        found.append(values)
    return found


def _part(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if part.get("type") not in TEXT_PARTS or not isinstance(text, str):
        raise bad_request("messages have a part that is no text; this model reads text only.", "messages")
    return text


def _tools(call: ChatRequest, service: Service) -> list[dict[str, Any]] | None:
    """The tools for the template; None: there are none."""
    choice = call.tool_choice
    if not call.tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools.", "tool_choice")
        return None
    if not writes_tool_calls(service.model.tokenizer.chat_template):
        raise bad_request(
            "This model's chat template has no tools that this server can read (it reads <tool_call> as Hermes and "
            "Qwen write it); leave tools out.",
            "tools",
        )
    if choice == "none":
        return None
    if choice not in (None, "auto"):
        raise bad_request("tool_choice can be auto or none: no call can be forced.", "tool_choice")
    return [tool.model_dump(exclude_none=True) for tool in call.tools]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One call while it is answered."""

    call: ChatRequest
    prompt: list[int]
    params: SamplingParams
    service: Service
    name: str
    created_s: int
    reads_tools: bool

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The reply when all answers are at their end."""
        outputs = await texts.outputs()
        usage = Usage.of([self.prompt], outputs)
        choices = [self._choice(number, output) for number, output in enumerate(outputs)]
        return self.body("chat.completion", choices) | {"usage": usage.body} | self._prompt_fields(outputs[0])

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every object of the reply has, and these choices."""
        return {
            "id": self.name,
            "object": kind,
            "created": self.created_s,
            "model": self.service.model.name,
            "choices": choices,
        }

    def _choice(self, number: int, output: RequestOutput) -> dict[str, Any]:
        reason = finish_reason(output)
        words, calls = ToolReader().feed(output.text, final=True) if self.reads_tools else (output.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": words if words or not calls else None}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = [_call_body(tool_call) for tool_call in calls]
            reason = "tool_calls" if reason == "stop" else reason
        choice: dict[str, Any] = {
            "index": number,
            "message": message,
            "logprobs": None,
            "finish_reason": reason,
            "stop_reason": output.stop_reason,
        }
        if output.logprobs is not None:
            choice["logprobs"] = chat_logprobs(self.service.model.tokenizer, output.logprobs)
        if self.call.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice

    def _prompt_fields(self, output: RequestOutput) -> dict[str, Any]:
        """What vLLM tells of the prompt, where it is asked for."""
        found: dict[str, Any] = {}
        if self.call.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(self.service.model.tokenizer, output.prompt_logprobs or ())
        if self.call.return_token_ids:
            found["prompt_token_ids"] = self.prompt
        return found


class _AnswerFrames:
    """The frames of an answer that is streamed, one for each event of its texts."""

    def __init__(self, answer: _Answer) -> None:
        self.usage = Usage.of([answer.prompt])
        self._answer = answer
        self._call = call = answer.call
        self._readers = [ToolReader() for _ in range(answer.params.n)]
        self._begun: set[int] = set()
        # After the first event of a text, those of a plain call differ in what they say alone.
        self._is_plain = not (call.logprobs or call.return_token_ids or call.tells_usage_always)
        self._plain: dict[int, TextFrames] = {}

    def frame(self, number: int, event: Event) -> bytes:
        """What a client is told of this event of text `number`.

        Raises:
            ApiError: the text has ended in an error.
        """
        if not isinstance(event, TextDelta):
            return to_frame(self._ended(number, event))
        self.usage.completion_tokens += len(event.token_ids)
        reader = self._readers[number]
        before = reader.num_calls
        words, calls = reader.feed(event.text) if self._answer.reads_tools else (event.text, [])
        if not calls and number in self._plain:
            return self._plain[number].write(words)
        delta: dict[str, Any] = {"content": words}
        if calls:
            delta["tool_calls"] = _call_deltas(calls, before)
        fields: dict[str, Any] = {}
        if self._call.logprobs:
            fields["logprobs"] = chat_logprobs(self._answer.service.model.tokenizer, event.logprobs)
        if self._call.return_token_ids:
            fields["token_ids"] = list(event.token_ids)
        frame = to_frame(self._chunk(number, delta, **fields))
        if self._is_plain and number not in self._plain:
            self._plain[number] = TextFrames(lambda text: self._chunk(number, {"content": text}))
        return frame

    def closing(self) -> bytes:
        """The usage, where it is asked for."""
        return (
            to_frame(self._answer.body("chat.completion.chunk", []) | {"usage": self.usage.body})
            if self._call.tells_usage
            else b""
        )

    def _ended(self, number: int, event: RequestOutput) -> dict[str, Any]:
        reason = finish_reason(event)
        self.usage.cached_tokens += 0 if number else event.report.cached_tokens
        reader = self._readers[number]
        before = reader.num_calls
        words, calls = reader.feed("", final=True)
        delta: dict[str, Any] = {"content": words} if words else {}
        if calls:
            delta["tool_calls"] = _call_deltas(calls, before)
        reason = "tool_calls" if reader.num_calls and reason == "stop" else reason
        return self._chunk(number, delta, finish_reason=reason, stop_reason=event.stop_reason)

    def _chunk(self, number: int, delta: dict[str, Any], **fields: object) -> dict[str, Any]:
        # The role comes with the first words: who counts events as tokens would count one too many.
        role = {} if number in self._begun else {"role": "assistant"}
        self._begun.add(number)
        choice = {"index": number, "delta": role | delta, "logprobs": None, "finish_reason": None, **fields}
        call = self._call
        told = {"usage": self.usage.body if call.tells_usage_always else None} if call.tells_usage else {}
        return self._answer.body("chat.completion.chunk", [choice]) | told


def _call_body(tool_call: ToolCall) -> dict[str, Any]:
    function = {"name": tool_call.name, "arguments": tool_call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _call_deltas(calls: Sequence[ToolCall], first: int) -> list[dict[str, Any]]:
    return [{"index": first + place, **_call_body(tool_call)} for place, tool_call in enumerate(calls)]
