"""The engine: requests come and go between steps, and every step moves each of them on by a chunk or a token."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from time import perf_counter

import torch

from alisa.attention.timing import StepSection
from alisa.config import SamplingParams
from alisa.engine.costs import MeasuredCosts
from alisa.engine.guide import GuideMaker
from alisa.engine.open_request import OpenRequest
from alisa.engine.output import EngineOutput, RequestText
from alisa.engine.prefix import PrefixRules
from alisa.engine.prompt import PromptReader
from alisa.engine.report import step_record
from alisa.engine.runner import ModelRunner, StepResult
from alisa.engine.sampler import SampledRow, sample
from alisa.engine.status import EngineStatus, RequestView
from alisa.engine.threads import ThreadGovernor
from alisa.errors import InputError
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import FinishReason, Medium, RequestOutput, TextDelta
from alisa.scheduler.plan import StepPlan
from alisa.scheduler.request import Request, RequestStatus
from alisa.scheduler.scheduler import Scheduler

NOT_FINITE = (
    "the model gave a logit that is no finite number; a weight is damaged, or --dtype float16 overflows with this model"
)

NO_TOKEN = "no token of the model leads on to a text of its grammar"


class Engine:
    """Runs requests that are added and aborted at any time. One thread at a time may call it; see `SharedEngine`.

    Args:
        scheduler: who runs next, and where rows go.
        runner: the model with its cache.
        costs: what restoring a preempted sequence costs, learnt here.
        tokenizer: None: prompts are token ids, and no text comes out.
        prompts: checks what is asked.
        governor: chooses how many threads a step runs on.
        eos_ids: token ids that end a request unless it ignores them.
        prefix_rules: of the session's prefix cache; None: it has none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        costs: MeasuredCosts,
        tokenizer: Tokenizer | None,
        prompts: PromptReader,
        governor: ThreadGovernor,
        *,
        eos_ids: frozenset[int],
        prefix_rules: PrefixRules | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._session = runner.session
        self._costs = costs
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._governor = governor
        self._eos_ids = eos_ids
        self._prefix_rules = prefix_rules
        self._guides = GuideMaker(tokenizer, eos_ids)
        self._open: dict[str, OpenRequest] = {}
        self._names = itertools.count()
        self._sampled = runner.timer.timed(StepSection.SAMPLING, sample)
        self._process = os.getpid()
        self._closed = False

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return self._prompts.max_model_len

    @property
    def has_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_requests

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> str:
        """Queue a request; it starts as soon as there is room.

        Args:
            prompt: text, or token ids that are taken as they are.
            params: how to continue it.
            request_id: a name of the caller's; None: one is made.
            priority: lower ones are admitted first.
            cache_salt: the prefix cache shares nothing between requests with different ones.

        Returns:
            The request's name.

        Raises:
            RequestError: the prompt cannot be used.
            InputError: the name is taken, more than one text is asked for, its grammar cannot be used, or the engine
                is closed.
            CapacityError: the request cannot fit even when it runs alone.
        """
        self._check_usable()
        if params.n != 1:
            raise InputError(f"A request is one text, and n is {params.n}; add a request for each of them.")
        prompt_ids, max_new_tokens = self._prompts.read(prompt, params)
        name = f"request-{next(self._names)}" if request_id is None else request_id
        request = Request(name, prompt_ids, params, max_new_tokens, priority, perf_counter())
        if (rules := self._prefix_rules) is not None:
            request.block_names = rules.names(prompt_ids, request.num_rows, cache_salt)
            # Tokens that are restored give no logits.
            request.max_restored = 0 if params.prompt_logprobs is not None else rules.most(len(prompt_ids))
        text = RequestText(prompt, params, self._tokenizer)
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        opened = OpenRequest(text, eos_ids | {*params.stop_ids, *text.stop_ids}, self._guides.guide(params))
        self.scheduler.add(request)
        self._open[name] = opened
        return name

    def prepare_guides(self) -> None:
        """The first request with a grammar does not have to wait for what all of them need.

        Raises:
            InputError: grammars are not to be had.
        """
        self._guides.prepare()

    def abort(self, request_id: str) -> RequestOutput | None:
        """The request is over, in whatever state it was, and everything it held is free; None: there is none."""
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        if request.req_idx is not None:
            self._session.close(request.req_idx)
        return self._output(request)

    @torch.inference_mode()
    def step(self) -> EngineOutput:
        """Do the next piece of work; an empty output when there is none."""
        self._check_usable()
        self._governor.before_step()
        self._runner.timer.reset()
        plan = self.scheduler.schedule(self._session.cache)
        if plan is None:
            return EngineOutput()
        running = {request.req_idx: request for request in self.scheduler.running}
        requests = [running[chunk.req_idx] for chunk in plan.chunks]
        result = self._run(plan, requests)
        grown, failed = self._advance(plan, requests, result)
        record = step_record(plan, result.traffic, self._runner)
        self._costs.learn(record)
        deltas, finished = self._collect(plan, grown, failed)
        if not self.has_requests:
            self._governor.restore()
        return EngineOutput(deltas, finished, record, plan, tuple(request.request_id for request in requests))

    def status(self) -> EngineStatus:
        """What is going on; call it between steps."""
        cache, now = self._session.cache, perf_counter()
        return EngineStatus(
            tuple(_view(request, now) for request in self.scheduler.requests.values()),
            device_bytes=cache.nbytes(Medium.DEVICE),
            host_bytes=cache.nbytes(Medium.HOST),
            disk_bytes=cache.nbytes(Medium.DISK),
        )

    def close(self) -> None:
        """Requests are forgotten; rows, files and threads are given back. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._governor.restore()
            self._session.cache.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise InputError("This engine is closed; make another one.")
        if os.getpid() != self._process:
            raise InputError(
                "This model was loaded in another process, and its threads do not survive a fork; load it after the "
                "fork, or start processes with the method 'spawn'."
            )

    def _run(self, plan: StepPlan, requests: Sequence[Request]) -> StepResult:
        """The plan's tokens have been through the model."""
        tokens = [r.token_ids[c.start : c.end] for r, c in zip(requests, plan.chunks, strict=True)]
        # A prompt that is not read to its end, and a sequence that catches up with what it had said, choose no token.
        wanted = [len(r.token_ids) == c.end for r, c in zip(requests, plan.chunks, strict=True)]
        opened = [self._open[request.request_id] for request in requests]
        kept = [n for n, chunk in enumerate(plan.chunks) if opened[n].wants_scores(requests[n], chunk)]
        result = self._runner.run(plan, tokens, wanted, kept)
        for number, hidden in result.kept.items():
            opened[number].score_prompt(requests[number], plan.chunks[number], hidden, self._runner.decoder.logits)
        return result

    def _advance(
        self, plan: StepPlan, requests: Sequence[Request], result: StepResult
    ) -> tuple[list[Request], dict[int, str]]:
        """Every request that is up to date has one more token, or has failed.

        Returns:
            The requests that have grown, and the request indices that have failed, and why.
        """
        shape = self._session.shape
        for request, chunk, attended in zip(requests, plan.chunks, result.traffic.tokens_attended, strict=True):
            request.tokens_attended += attended
            request.tokens_dense += 0 if plan.prefill else shape.dense_reads(chunk.end)
        ready = [r for r, c in zip(requests, plan.chunks, strict=True) if len(r.token_ids) == c.end]
        grown: list[Request] = []
        failed = dict(result.traffic.failed)
        if not ready:
            return grown, failed
        opened = [self._open[request.request_id] for request in ready]
        rows = [
            SampledRow(request.params, request.token_ids, len(request.output_ids), its.end_ids, its.guide)
            for request, its in zip(ready, opened, strict=True)
        ]
        sampled = self._sampled(result.logits, rows)
        now = perf_counter()
        for number, (request, its, token_id) in enumerate(zip(ready, opened, sampled.token_ids, strict=True)):
            assert request.req_idx is not None, "a request that runs has an index"
            if request.req_idx in failed:
                continue
            if token_id is None:
                failed[request.req_idx] = NOT_FINITE if its.guide is None else NO_TOKEN
                continue
            if not request.output_ids:
                request.first_token_s = now
            if its.guide is not None:
                its.guide.accept(token_id)
                if its.guide.error:
                    failed[request.req_idx] = f"its grammar cannot be followed any further ({its.guide.error})"
                    continue
            if number in sampled.logprobs:
                its.logprobs.append(sampled.logprobs[number])
            request.append(token_id)
            request.finish_reason = self._finish_reason(request, its, token_id)
            grown.append(request)
        return grown, failed

    def _finish_reason(self, request: Request, its: OpenRequest, token_id: int) -> FinishReason | None:
        if token_id in its.end_ids:
            return "eos" if token_id in self._eos_ids and not request.params.ignore_eos else "stop"
        if its.guide is not None and its.guide.is_over:
            return "stop"
        return "length" if len(request.output_ids) == request.max_new_tokens else None

    def _collect(
        self, plan: StepPlan, grown: Sequence[Request], failed: dict[int, str]
    ) -> tuple[tuple[TextDelta, ...], tuple[RequestOutput, ...]]:
        """Text of the step's tokens, and the requests that are over: they have left, with everything they held."""
        deltas: list[TextDelta] = []
        for request in grown:
            its, token_id = self._open[request.request_id], request.output_ids[-1]
            new = its.text.feed(token_id, ended=request.finish_reason)
            if its.text.stopped is not None:
                request.finish_reason = "stop"
            deltas.append(TextDelta(0, new, request.request_id, (token_id,), 0, tuple(its.logprobs[-1:])))
        finished = [request for request in grown if request.finish_reason is not None]
        lost = [r for r in (*self.scheduler.running, *self.scheduler.swapped) if r.req_idx in failed]
        self.scheduler.update(plan, finished, failed)
        outputs = []
        for request in (*finished, *lost):
            assert request.req_idx is not None, "a request that was in a step has an index"
            self._session.close(request.req_idx)
            if rest := self._open[request.request_id].text.flush():  # of one that failed: the others have shown all
                deltas.append(TextDelta(0, rest, request.request_id))
            outputs.append(self._output(request))
        return tuple(deltas), tuple(outputs)

    def _output(self, request: Request) -> RequestOutput:
        return self._open.pop(request.request_id).output(request)


def _view(request: Request, now: float) -> RequestView:
    """The request as it is at the time `now` of its own clock."""
    if request.status is RequestStatus.RUNNING:
        status = "prefill" if request.in_prefill else "decode"
    else:
        status = str(request.status)
    return RequestView(
        request_id=request.request_id,
        status=status,
        priority=request.priority,
        prompt_tokens=request.prompt_len,
        tokens_read=min(request.num_cached, request.prompt_len),
        output_tokens=len(request.output_ids),
        arrived_s=now - request.arrival_s,
        admitted_s=now - request.admitted_s if request.admitted_s else None,
        first_token_s=now - request.first_token_s if request.first_token_s else None,
    )
