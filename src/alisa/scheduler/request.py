"""A request as it was asked, and the sequence it becomes while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from alisa.config import SamplingParams
from alisa.outputs import FinishReason


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids, and how to continue it."""

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    """`params.max_tokens`, or less where the model's positions end earlier."""

    @property
    def num_rows(self) -> int:
        """KV rows the request may come to need: the last token is returned, never fed."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request: its request index, its tokens, how far they are cached, and what it has cost so far."""

    request: Request
    req_idx: int
    submitted_s: float
    admitted_s: float
    token_ids: list[int]
    """Prompt and output."""
    num_cached: int = 0
    """Tokens whose rows are in the store."""
    first_token_s: float = 0.0
    finished_s: float = 0.0
    finish_reason: FinishReason | None = None
    error: str = ""
    """Why it ended with the reason `error`."""
    tokens_attended: int = 0
    tokens_dense: int = 0
    num_preempted: int = 0
    """How often it had to give way."""
    output_ids: list[int] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_cached < self.prompt_len

    @property
    def wants_token(self) -> bool:
        """Whether everything up to the newest token has been through the model, so that the next can be chosen.

        False while a prompt is read, and while a sequence that lost its rows catches up with what it had said.
        """
        return self.num_cached == len(self.token_ids)

    def append(self, token_id: int) -> None:
        """Take in a sampled token."""
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)
