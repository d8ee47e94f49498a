"""What the engine keeps of a request besides its tokens, from its arrival to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from alisa.engine.guide import Guide
from alisa.engine.logprobs import token_logprobs
from alisa.engine.output import RequestText
from alisa.outputs import RequestOutput, RequestReport, TokenLogprob
from alisa.scheduler.plan import ScheduledChunk
from alisa.scheduler.request import Request

SCORED_TOKENS = 32
"""Tokens of a prompt whose logits are held at once: with the largest vocabularies there are, 32 MiB. Cut by the prompt
alone, so that their last bits do not depend on other prompts."""


@dataclass(slots=True)
class OpenRequest:
    """The text of a request, its grammar, and the log probabilities that it asks for."""

    text: RequestText
    end_ids: frozenset[int]
    """Tokens that end it."""
    guide: Guide | None = None
    answer_salt: str | None = None
    """Under which salt the prefix cache is to know prompt and output; None: it need not."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def wants_scores(self, request: Request, chunk: ScheduledChunk) -> bool:
        """Whether this chunk has tokens of the prompt that are to be scored, and have not been yet."""
        scored = 1 + len(self.prompt_logprobs)
        return request.params.prompt_logprobs is not None and chunk.start < scored < request.prompt_len

    def score_prompt(
        self, request: Request, chunk: ScheduledChunk, hidden: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> None:
        """The tokens that follow those of a chunk have their log probabilities.

        Args:
            request: whose prompt it is.
            chunk: the piece of the prompt that was read.
            hidden: `[N, E]`, what came out of the model for its tokens.
            logits: hidden states to Float32[N, V].
        """
        num_top = request.params.prompt_logprobs
        assert num_top is not None, "nobody asked for scores"
        following: Sequence[int] = request.prompt_ids[chunk.start + 1 : chunk.end + 1]
        for start in range(0, len(following), SCORED_TOKENS):
            tokens = following[start : start + SCORED_TOKENS]
            self.prompt_logprobs += token_logprobs(logits(hidden[start : start + len(tokens)]), tokens, num_top)

    def output(self, request: Request) -> RequestOutput:
        """The request, which is over, as the caller sees it."""
        reason, params = request.finish_reason, request.params
        assert reason is not None, "only finished requests are shown"
        self.text.flush()
        return RequestOutput(
            index=0,
            request_id=request.request_id,
            prompt=self.text.prompt,
            prompt_ids=tuple(request.prompt_ids),
            text=self.text.text,
            token_ids=tuple(request.output_ids),
            finish_reason=reason,
            report=RequestReport(
                prompt_tokens=request.prompt_len,
                output_tokens=len(request.output_ids),
                queue_s=request.admitted_s - request.arrival_s,
                prefill_s=request.first_token_s - request.admitted_s,
                first_token_s=request.first_token_s - request.arrival_s,
                decode_s=request.finished_s - request.first_token_s,
                tokens_attended=request.tokens_attended,
                tokens_dense=request.tokens_dense,
                cached_tokens=request.cached_tokens,
                drafted_tokens=request.drafted_tokens,
                accepted_tokens=request.accepted_tokens,
            ),
            error=request.error,
            stop_reason=self._stop_reason(request),
            logprobs=None if params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )

    def _stop_reason(self, request: Request) -> str | int | None:
        if request.finish_reason != "stop":
            return None
        if self.text.stopped is not None:
            return self.text.stopped
        last = request.output_ids[-1]
        return last if last in request.params.stop_ids else self.text.stop_ids.get(last)
