"""How many tokens a call has read and written, as clients are billed for them elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alisa.outputs import RequestOutput
from alisa.server.errors import ApiError

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
"""Of the engine, and what OpenAI calls them."""


@dataclass(slots=True)
class Usage:
    """Of one call, while it runs."""

    prompt_tokens: int
    """Of all prompts, each counted once."""
    completion_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], outputs: Sequence[RequestOutput] = ()) -> Usage:
        """Before the first token, or of all texts: as many for each prompt, those of one prompt after each other."""
        first_of_each = outputs[:: len(outputs) // len(prompts) or 1]
        return cls(
            sum(map(len, prompts)),
            sum(len(output.token_ids) for output in outputs),
            sum(output.report.cached_tokens for output in first_of_each),
        )

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def finish_reason(output: RequestOutput) -> str:
    """Why a text ended, in OpenAI's words.

    Raises:
        ApiError: it ended in an error, or because the server does.
    """
    if output.finish_reason == "abort":
        raise ApiError(503, "The server is shutting down.", kind="service_unavailable_error")
    if output.finish_reason == "error":
        raise ApiError(500, f"The text ended early: {output.error}.", kind="internal_error")
    return FINISH_REASONS[output.finish_reason]
