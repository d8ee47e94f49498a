"""What a step gives to the outside: text as it grows, finished requests, and what the step was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alisa.config import SamplingParams
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import FinishReason, RequestOutput, RequestReport, StepRecord, TextDelta
from alisa.scheduler.plan import StepPlan
from alisa.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """One step; without a record: there was nothing to do."""

    deltas: tuple[TextDelta, ...] = ()
    finished: tuple[RequestOutput, ...] = ()
    record: StepRecord | None = None
    plan: StepPlan | None = None
    request_ids: tuple[str, ...] = ()
    """The requests that took part."""


class RequestText:
    """The text of a request: grows token by token, and ends before the first stop string.

    What might be the beginning of a stop string is held back until the next tokens decide. A stop string that is one
    special token of the model (`<|im_end|>`) never comes as text: it ends the request by its id.

    Args:
        prompt: as it was given.
        params: its stop strings.
        tokenizer: None: there is no text.
    """

    def __init__(self, prompt: str | Sequence[int], params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.prompt = prompt if isinstance(prompt, str) else ""
        self._stop = params.stop
        self.stop_ids = frozenset() if tokenizer is None else tokenizer.special_ids(params.stop)
        """Token ids that stand for one of the stop strings."""
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer()
        self._held = ""
        self._shown: list[str] = []
        self.stopped = False
        """A stop string has been reached; nothing more will be shown."""

    def feed(self, token_id: int, *, ended: FinishReason | None) -> str:
        """Text that became certain with this token, and with it all the rest where the request has ended."""
        if self._detokenizer is None:
            return ""
        # The model's own end token, and a special token that stops, are output tokens, but not text.
        is_text = ended != "eos" and token_id not in self.stop_ids
        new = self._release(self._detokenizer.feed(token_id), final=False) if is_text else ""
        return new + self.flush() if ended is not None else new

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self._detokenizer is None else self._release(self._detokenizer.flush(), final=True)

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + new
        cuts = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            self._held, ready = "", pending[: min(cuts)]
        else:
            keep = 0 if final else max((_overlap(pending, stop) for stop in self._stop), default=0)
            ready, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        if ready:
            self._shown.append(ready)
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def request_output(request: Request, text: RequestText) -> RequestOutput:
    """A request that is over, as the caller sees it."""
    reason = request.finish_reason
    assert reason is not None, "only finished requests are shown"
    text.flush()
    return RequestOutput(
        index=0,
        request_id=request.request_id,
        prompt=text.prompt,
        prompt_ids=tuple(request.prompt_ids),
        text=text.text,
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
        ),
        error=request.error,
    )
