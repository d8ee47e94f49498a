"""One request from its arrival to its end: what was asked, where it stands, and what it has cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from alisa.budget import Budget
from alisa.config import SamplingParams
from alisa.outputs import FinishReason
from alisa.scheduler.prefix import BlockName


class RequestStatus(StrEnum):
    """Which of the scheduler's queues holds a request."""

    WAITING = "waiting"
    """It has no request index and no rows: it is new, or it lost both to others."""
    RUNNING = "running"
    SWAPPED = "swapped"
    """It keeps its request index and its rows, and takes part in no step until there is room for it."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt to continue. The scheduler moves it between its queues, the engine appends tokens to it.

    Times are seconds on the clock of `time.perf_counter`.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int
    """`params.max_tokens`, or less where the model's positions end earlier."""
    priority: int = 0
    """Requests with a lower number go first; equal ones in the order of their arrival."""
    arrival_s: float = 0.0
    client: str | None = None
    """Who sent it, where the order of the queue is to be fair; None: it counts for nobody."""
    budget: Budget | None = None
    """How much its decode steps may read, no more than the policy's own budget says; None: just that."""
    block_names: tuple[BlockName, ...] = ()
    """Names of the whole blocks of the prompt; none where there is no prefix cache."""
    max_restored: int = 0
    """Tokens at the start of the prompt that may come from the prefix cache: fewer than the prompt has, because the
    last one chooses the first token of the output."""

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: str = field(default="", init=False)
    """Why it ended with the reason `error`."""
    req_idx: int | None = field(default=None, init=False)
    """Its request index. A finished request still has it: the caller closes it in the cache."""
    token_ids: list[int] = field(init=False)
    """Prompt and output."""
    output_ids: list[int] = field(default_factory=list, init=False)
    num_cached: int = field(default=0, init=False)
    """Tokens whose rows are in the cache."""
    num_drafts: int = field(default=0, init=False)
    """Tokens after the newest that the next decode step should try; see `alisa.engine.speculator`."""
    draft_ids: list[int] = field(default_factory=list, init=False)
    """Those of them that are known: none before the policy has made them up."""
    predicted_len: float | None = field(default=None, init=False)
    """Tokens that the output is likely to have, where the order of the queue asks for that."""
    cached_tokens: int = field(default=0, init=False)
    """Prompt tokens that came from the prefix cache when it was read for the first time."""
    admitted_s: float = field(default=0.0, init=False)
    """When it was admitted for the first time."""
    first_token_s: float = field(default=0.0, init=False)
    finished_s: float = field(default=0.0, init=False)
    tokens_attended: int = field(default=0, init=False)
    """Cached tokens that decode attention read, summed over steps and layers."""
    tokens_dense: int = field(default=0, init=False)
    """What dense attention would have read."""
    drafted_tokens: int = field(default=0, init=False)
    """Tokens that were tried before it was known whether they would come."""
    accepted_tokens: int = field(default=0, init=False)
    """Those of them that came."""
    num_preempted: int = field(default=0, init=False)
    """How often it was swapped, or lost its rows, for others."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def num_rows(self) -> int:
        """KV rows the request may come to need: the last token is returned, never fed."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def in_prefill(self) -> bool:
        """Whether part of the prompt is still unread."""
        return self.num_cached < len(self.prompt_ids)

    @property
    def wants_token(self) -> bool:
        """Whether everything up to the newest token has been through the model, so that the next can be chosen.

        False while a prompt is read, and while a request that lost its rows catches up with what it had said.
        """
        return self.num_cached == len(self.token_ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Ids at positions [start, end) of prompt, output and drafts; what is read of a long text is not all of it."""
        known = len(self.token_ids)
        return self.token_ids[start:end] + self.draft_ids[max(start - known, 0) : max(end - known, 0)]

    def append(self, token_id: int) -> None:
        """Take in a sampled token."""
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)
