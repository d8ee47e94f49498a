"""Who answers in a conversation: a model in this process, or one behind a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from alisa.config import EngineConfig, SamplingParams, format_bytes
from alisa.errors import InputError
from alisa.outputs import TextDelta

if TYPE_CHECKING:
    import httpx2

    from alisa.llm import LLM
    from alisa.outputs import RunSummary

Messages = Sequence[Mapping[str, str]]


class Talker(Protocol):
    """Answers conversations."""

    @property
    def name(self) -> str:
        """The model."""
        ...

    def answer(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]:
        """Text as it grows. Closing it ends the answer.

        Raises:
            AlisaError: the conversation cannot be answered.
        """
        ...

    def with_policy(self, policy: str, sparsity: float | None) -> Talker:
        """The same model with another policy, or another share that is not read.

        Raises:
            AlisaError: that is not to be had.
        """
        ...

    def stats(self) -> str:
        """What the last answer took, in one line; empty before the first."""
        ...

    def close(self) -> None:
        """What it held is given back."""
        ...


class LocalTalker:
    """A model in this process.

    Args:
        llm: closed with this.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._last: RunSummary | None = None
        self._reading: threading.Thread | None = None
        self._asked = threading.Event()

    @property
    def name(self) -> str:
        """The model, and how it reads."""
        config = self._llm.config
        return f"{Path(self._llm.name).name}, {config.policy} at sparsity {config.sparsity:g}"

    @property
    def was_trained_on_chats(self) -> bool:
        """Whether the model has a chat template; else it continues the text of the conversation."""
        return self._llm.tokenizer.has_chat_template

    def answer(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]:
        """Text as it grows; sampled as the model's files ask for, where the parameters are at their default."""
        llm = self._llm
        self._stop_reading()
        if self.was_trained_on_chats:
            prompt, params = llm.chat_prompt(messages), llm.own_sampling(params)
        else:
            prompt = llm.tokenizer.encode("\n".join(message["content"] for message in messages))
        with llm.stream([prompt], params, continues=True) as stream:
            try:
                for event in stream:
                    if isinstance(event, TextDelta):
                        yield event.text
                    elif event.finish_reason == "error":
                        raise InputError(f"The answer ended early: {event.error}.")
            finally:
                self._last = stream.report().summary
                stream.close()
                self._read_answer()

    def with_policy(self, policy: str, sparsity: float | None) -> LocalTalker:
        """The model is loaded again; this one is closed when that has worked."""
        config = self._llm.config
        changed = replace(config, policy=policy, sparsity=config.sparsity if sparsity is None else sparsity)
        talker = local_talker(changed)
        self.close()
        return talker

    def stats(self) -> str:
        """Speed, what was read of the cache, and its memory."""
        last = self._last
        if last is None:
            return ""
        read = last.tokens_attended / last.tokens_dense if last.tokens_dense else 1.0
        speed = f"{last.decode_tokens / last.decode_s:.1f} tokens/s" if last.decode_s else "no decode step"
        lower = f" and {format_bytes(last.disk_peak_bytes)} on disk" if last.disk_peak_bytes else ""
        cached = f" ({last.cached_tokens} cached)" if last.cached_tokens else ""
        return (
            f"{last.output_tokens} tokens after {last.prompt_tokens}{cached}, prompt {last.prefill_s:.2f} s, {speed}, "
            f"read {read:.0%} of K and V, {format_bytes(last.kv_peak_bytes)} of them{lower}"
        )

    def close(self) -> None:
        """The model's memory is given back."""
        self._stop_reading()
        self._llm.close()

    def _read_answer(self) -> None:
        """While the user reads and types, the answer is read, so that the next turn knows it."""
        self._asked.clear()
        self._reading = threading.Thread(target=self._read, name="alisa-answers", daemon=True)
        self._reading.start()

    def _read(self) -> None:
        while not self._asked.is_set() and self._llm.read_answer():
            pass

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._asked.set()
            self._reading.join()
            self._reading = None


def local_talker(config: EngineConfig) -> LocalTalker:
    """A model that is loaded here.

    Raises:
        AlisaError: it cannot be.
    """
    # Here and not above: the command line is read without torch.
    from alisa.llm import LLM

    return LocalTalker(LLM(config=config))


@dataclass(slots=True)
class _Measured:
    """One answer of a server."""

    seconds: float = 0.0
    first_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class RemoteTalker:
    """A model behind a server of OpenAI's API.

    Args:
        url: of the server, with or without /v1.
        api_key: what it wants; None: nothing.

    Raises:
        InputError: nobody answers there, or as this does not understand.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        import httpx2

        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        base = url.rstrip("/")
        self._url = base if base.endswith("/v1") else f"{base}/v1"
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(10.0, read=600.0))
        self._measured: _Measured | None = None
        try:
            self.name = self._first_model()
        except BaseException:
            self.close()
            raise

    def answer(self, messages: Messages, params: SamplingParams) -> Generator[str, None, None]:
        """Text as it grows; what the parameters do not say is up to the server."""
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.max_tokens,
            **_changed(params),
        }
        measured, began = _Measured(), perf_counter()
        with (
            self._understood(),
            self._client.stream("POST", f"{self._url}/chat/completions", json=body) as reply,
        ):
            if reply.is_error:
                reply.read()
            self._refuse(reply)
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise InputError(f"The server says: {event['error']['message']}")
                measured.first_s = measured.first_s or perf_counter() - began
                if usage := event.get("usage"):
                    measured.prompt_tokens, measured.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    measured.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
        measured.seconds = perf_counter() - began
        self._measured = measured

    def with_policy(self, policy: str, sparsity: float | None) -> RemoteTalker:
        """Never: a server has one policy for all."""
        raise InputError("The policy is the server's; start it with another --policy.")

    def stats(self) -> str:
        """Speed, as seen from here."""
        last = self._measured
        if last is None:
            return ""
        rest = last.seconds - last.first_s
        speed = f", {(last.output_tokens - 1) / rest:.1f} tokens/s" if last.output_tokens > 1 and rest > 0 else ""
        cached = f" ({last.cached_tokens} cached)" if last.cached_tokens else ""
        return (
            f"{last.output_tokens} tokens after {last.prompt_tokens}{cached}, first after {last.first_s:.2f} s{speed}"
        )

    def close(self) -> None:
        """The connection is closed."""
        self._client.close()

    def _first_model(self) -> str:
        with self._understood():
            reply = self._client.get(f"{self._url}/models")
            self._refuse(reply)
            return str(reply.json()["data"][0]["id"])

    def _understood(self) -> _Understood:
        return _Understood(self._url)

    def _refuse(self, reply: httpx2.Response) -> None:
        if reply.is_success:
            return
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {reply.status_code}"
        raise InputError(f"The server says: {message}")


class _Understood:
    """What a server does that nobody understands becomes one sentence."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import httpx2

        if isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL)):
            raise InputError(f"{self._url} does not answer ({error}); is alisa serve running there?") from error
        if isinstance(error, (ValueError, KeyError, IndexError, TypeError)):
            raise InputError(f"{self._url} answers, but not as OpenAI's API does.") from error


def _changed(params: SamplingParams) -> dict[str, Any]:
    """Fields that are not at their default, by the names of the API."""
    default = SamplingParams()
    names = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "presence_penalty": "presence_penalty",
        "frequency_penalty": "frequency_penalty",
        "min_tokens": "min_tokens",
        "ignore_eos": "ignore_eos",
        "seed": "seed",
        "stop": "stop",
        "stop_ids": "stop_token_ids",
        "json_schema": "guided_json",
        "regex": "guided_regex",
    }
    found = {theirs: getattr(params, ours) for ours, theirs in names.items()}
    plain = {theirs: getattr(default, ours) for ours, theirs in names.items()}
    changed = {name: value for name, value in found.items() if value != plain[name]}
    if params.logit_bias:
        changed["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    return changed
