"""The next tokens of every request, from the logits of a step.

Each token is chosen as in a step of its own: with the text before it, its own random number, and the state of its
grammar. A draft only means that the logits after it are there already; they are looked at once the draft has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from alisa.attention.timing import StepSection, StepTimer
from alisa.engine.open_request import OpenRequest
from alisa.engine.sampler import SampledRow, sample
from alisa.outputs import FinishReason, TextDelta, TokenLogprob
from alisa.scheduler.request import Request

NOT_FINITE = (
    "the model gave a logit that is no finite number; a weight is damaged, or --dtype float16 overflows with this model"
)

NO_TOKEN = "no token of the model leads on to a text of its grammar"


@dataclass(slots=True)
class Grown:
    """A request that is up to date with the text that it has, and what this step has added to it."""

    request: Request
    its: OpenRequest
    first_row: int
    """Of the logits: that of its newest token; those of its drafts follow."""
    num_drafts: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str = ""
    """Why it cannot go on."""

    @property
    def num_accepted(self) -> int:
        """Drafts that came."""
        pairs = zip(self.request.draft_ids[: self.num_drafts], self.token_ids, strict=False)
        return next((n for n, (draft, token_id) in enumerate(pairs) if draft != token_id), self._most_accepted)

    @property
    def is_going_on(self) -> bool:
        """Whether the logits of the next token are there, because the newest one is the draft of its place."""
        count = len(self.token_ids)
        if self.error or self.request.finish_reason is not None or count > self.num_drafts:
            return False
        return count == 0 or self.request.draft_ids[count - 1] == self.token_ids[-1]

    @property
    def delta(self) -> TextDelta:
        """What the caller is told."""
        return TextDelta(0, self.text, self.request.request_id, tuple(self.token_ids), 0, tuple(self.logprobs))

    @property
    def _most_accepted(self) -> int:
        return min(self.num_drafts, len(self.token_ids))


class TokenChooser:
    """Gives requests their next tokens, and ends those that are over.

    Args:
        eos_ids: token ids that end a request unless it ignores them.
        timer: told how long it takes.
    """

    def __init__(self, eos_ids: frozenset[int], timer: StepTimer) -> None:
        self._eos_ids = eos_ids
        self._sample = timer.timed(StepSection.SAMPLING, sample)

    def choose(self, logits: Tensor, grown: Sequence[Grown], failed: frozenset[int]) -> None:
        """Every request has one more token, one more for each draft that came, or an error.

        Args:
            logits: Float32[N, V] of newest tokens and drafts; changed in place.
            grown: the requests, without tokens yet.
            failed: request indices whose rows are lost, so that their logits say nothing.
        """
        going = [one for one in grown if one.request.req_idx not in failed]
        while going:
            places = [one.first_row + len(one.token_ids) for one in going]
            whole = len(places) == len(logits)
            some = logits if whole else logits[torch.tensor(places, device=logits.device)]
            rows = [
                SampledRow(r.params, r.token_ids, len(r.output_ids), one.its.end_ids, one.its.guide)
                for one in going
                for r in (one.request,)
            ]
            sampled, now = self._sample(some, rows), perf_counter()
            for number, (one, token_id) in enumerate(zip(going, sampled.token_ids, strict=True)):
                if token_id is None:
                    one.error = NOT_FINITE if one.its.guide is None else NO_TOKEN
                else:
                    self._take(one, token_id, sampled.logprobs.get(number), now)
            going = [one for one in going if one.is_going_on]

    def _take(self, one: Grown, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """The request has this token, and knows whether it is its last."""
        request, its = one.request, one.its
        if not request.output_ids:
            request.first_token_s = now
        if its.guide is not None:
            its.guide.accept(token_id)
            if its.guide.error:
                one.error = f"its grammar cannot be followed any further ({its.guide.error})"
                return
        if logprob is not None:
            its.logprobs.append(logprob)
            one.logprobs.append(logprob)
        request.append(token_id)
        one.token_ids.append(token_id)
        request.finish_reason = self._finish_reason(request, its, token_id)
        one.text += its.text.feed(token_id, ended=request.finish_reason)
        if its.text.stopped is not None:
            request.finish_reason = "stop"

    def _finish_reason(self, request: Request, its: OpenRequest, token_id: int) -> FinishReason | None:
        if token_id in its.end_ids:
            return "eos" if token_id in self._eos_ids and not request.params.ignore_eos else "stop"
        if its.guide is not None and its.guide.is_over:
            return "stop"
        return "length" if len(request.output_ids) == request.max_new_tokens else None
