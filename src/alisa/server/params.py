"""From what a call asks for to how the engine samples; what cannot be done is refused by its name."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from alisa.config import NUM_SEEDS, EngineConfig, SamplingParams
from alisa.engine.budgets import ReadingParams, RequestBudgets
from alisa.errors import InputError
from alisa.policy.registry import POLICIES
from alisa.server.errors import ApiError, bad_request
from alisa.server.protocol import ChatRequest, CompletionRequest, GenerationRequest

OPENAI_TEMPERATURE = 1.0
OPENAI_MAX_TOKENS = 16
"""What OpenAI takes for a completion that does not say; a chat may go on to the model's last position."""


def completion_params(call: CompletionRequest, own: Mapping[str, float], config: EngineConfig) -> SamplingParams:
    """How to continue the prompts of a completion.

    Args:
        call: what the client sent.
        own: what the model's files say of how to sample from it.
        config: the engine's.

    Raises:
        ApiError: something is asked for that is not to be had.
    """
    if call.suffix:
        raise bad_request("suffix is not supported: these models continue texts, they fill no gaps.", "suffix")
    if call.best_of is not None and call.best_of != (call.n or 1):
        raise bad_request("best_of is not supported; ask for n texts and choose among them.", "best_of")
    max_tokens = OPENAI_MAX_TOKENS if call.max_tokens is None else call.max_tokens
    echoed = call.logprobs if call.echo else None
    prompt_logprobs = echoed if call.prompt_logprobs is None else call.prompt_logprobs
    return _params(call, own, config, max_tokens, logprobs=call.logprobs, prompt_logprobs=prompt_logprobs)


def chat_params(call: ChatRequest, own: Mapping[str, float], config: EngineConfig, room: int) -> SamplingParams:
    """How to answer; see `completion_params`.

    Args:
        call: what the client sent.
        own: as the model's files say.
        config: the engine's.
        room: tokens that may follow the prompt.
    """
    refused = {
        "functions": (call.functions, "functions are not supported; send tools."),
        "audio": (call.audio, "audio is not supported."),
        "chat_template": (call.chat_template, "A chat template is a program, and is not taken from a call."),
        "continue_final_message": (call.continue_final_message, "continue_final_message is not supported."),
    }
    for param, (given, message) in refused.items():
        if given:
            raise bad_request(message, param)
    if call.modalities not in (None, [], ["text"]):
        raise bad_request("modalities: there is only text.", "modalities")
    if call.top_logprobs is not None and not call.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    max_tokens = call.max_completion_tokens if call.max_completion_tokens is not None else call.max_tokens
    if max_tokens == 0:
        raise bad_request("max_tokens is 0, at least 1 is needed.", "max_tokens")
    logprobs = (call.top_logprobs or 0) if call.logprobs else None
    most = max(room, 1) if max_tokens is None else max_tokens
    return _params(call, own, config, most, logprobs=logprobs, prompt_logprobs=call.prompt_logprobs)


def _params(
    call: GenerationRequest,
    own: Mapping[str, float],
    config: EngineConfig,
    max_tokens: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    _refuse_other_engine(call, config)
    refused = {
        "logits_processors": (call.logits_processors, "logits_processors are programs, and are not taken from a call."),
        "use_beam_search": (call.use_beam_search, "Beam search is not supported."),
        "skip_special_tokens": (call.skip_special_tokens is False, "Special tokens are never part of the text."),
        "include_stop_str_in_output": (call.include_stop_str_in_output, "A stop string is never part of the text."),
    }
    for param, (given, message) in refused.items():
        if given:
            raise bad_request(message, param)
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
    given = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    temperature = own.get("temperature", OPENAI_TEMPERATURE) if call.temperature is None else call.temperature
    chosen: dict[str, Any] = {**own, **given, "temperature": temperature, **_grammar(call)}
    try:
        return SamplingParams(
            max_tokens=max(max_tokens, 1),  # none at all: the caller leaves the one token out
            n=call.n or 1,
            stop=(call.stop,) if isinstance(call.stop, str) else tuple(call.stop or ()),
            stop_ids=tuple(call.stop_token_ids or ()),
            ignore_eos=bool(call.ignore_eos),
            logit_bias=_biases(call),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            seed=secrets.randbelow(NUM_SEEDS) if call.seed is None else call.seed % NUM_SEEDS,
            **chosen,
        )
    except InputError as error:
        blamed = next((name for name in ("temperature", *names) if name in str(error)), None)
        raise bad_request(str(error), blamed) from error


def reading_params(call: GenerationRequest, budgets: RequestBudgets) -> ReadingParams:
    """How much is read for the texts of a call.

    Raises:
        ApiError: this engine cannot read so much, or so little.
    """
    asked = ReadingParams(call.sparsity, call.coverage)
    try:
        budgets.budget(asked)
    except InputError as error:
        raise bad_request(str(error), str(error).partition(" ")[0]) from error
    return asked


def _refuse_other_engine(call: GenerationRequest, config: EngineConfig) -> None:
    """One engine has one policy."""
    if call.policy is not None and call.policy != config.policy:
        can_ask = POLICIES[config.policy].mixes and not config.exact
        own = ", or ask for a sparsity of its own" if can_ask else ""
        raise bad_request(
            f"policy is {call.policy[:100]!r}, and this server runs with {config.policy!r} for all calls; leave it "
            f"out{own}, or start a server with another --policy.",
            "policy",
        )


def _biases(call: GenerationRequest) -> tuple[tuple[int, float], ...]:
    biases = call.logit_bias or {}
    if bad := [name for name in biases if not name.isascii() or not name.isdecimal() or len(name) > 9]:
        raise bad_request(f"logit_bias has {bad[0][:20]!r} in place of a token id.", "logit_bias")
    return tuple((int(name), bias) for name, bias in biases.items())


def _grammar(call: GenerationRequest) -> dict[str, str]:
    """The grammar of the text, as fields of `SamplingParams`."""
    found = [*_openai_grammar(call), *_vllm_grammar(call)]
    if len(found) > 1:
        raise bad_request("More than one form was asked for; a text follows one.", "response_format")
    return dict(found)


def _openai_grammar(call: GenerationRequest) -> list[tuple[str, str]]:
    asked = call.response_format
    if asked is None or asked.type == "text":
        return []
    if asked.type == "json_object":
        return [("json_schema", '{"type": "object"}')]
    if asked.type == "regex":
        return [("regex", _present(asked.regex, "response_format"))]
    schema = None if asked.json_schema is None else asked.json_schema.schema_
    return [("json_schema", json.dumps(_present(schema, "response_format")))]


def _vllm_grammar(call: GenerationRequest) -> list[tuple[str, str]]:
    asked = call.structured_outputs
    found: list[tuple[str, str]] = []
    if asked is not None:
        for name, value in (("choice", asked.choice), ("grammar", asked.grammar), ("tag", asked.structural_tag)):
            if value is not None:
                raise bad_request(f"structured_outputs.{name} is not supported; send a regex or a JSON schema.", name)
        if asked.json_object:
            found.append(("json_schema", '{"type": "object"}'))
        found += [("json_schema", _as_json(asked.json_))] if asked.json_ is not None else []
        found += [("regex", asked.regex)] if asked.regex is not None else []
    found += [("json_schema", _as_json(call.guided_json))] if call.guided_json is not None else []
    found += [("regex", call.guided_regex)] if call.guided_regex is not None else []
    return found


def _as_json(schema: dict[str, Any] | str) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _present(value: Any, param: str) -> Any:  # noqa: ANN401 - a JSON value
    if value is None:
        raise bad_request(f"{param} says what kind it is, and not which.", param)
    return value


def check_model(asked: str | None, served: str) -> None:
    """The model that a call names is the one that is served.

    Raises:
        ApiError: it is another.
    """
    if asked is not None and asked != served:
        raise ApiError(
            404, f"There is no model {asked[:200]!r} here; there is {served!r}.", param="model", code="model_not_found"
        )
