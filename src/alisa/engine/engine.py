"""The engine: requests come and go between steps, and every step moves each of them on by a chunk or a token."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from alisa.attention.session import StepTraffic
from alisa.config import SamplingParams
from alisa.engine.answers import AnswerReader
from alisa.engine.budgets import AS_CONFIGURED, ReadingParams, RequestBudgets
from alisa.engine.chooser import Grown, TokenChooser
from alisa.engine.costs import MeasuredCosts
from alisa.engine.drafter import Drafts, PolicyDrafter, with_drafting
from alisa.engine.guide import GuideMaker
from alisa.engine.open_request import OpenRequest
from alisa.engine.output import EngineOutput, RequestText
from alisa.engine.prefix import PrefixRules
from alisa.engine.prompt import PromptReader
from alisa.engine.report import dense_reads, step_record
from alisa.engine.runner import ModelRunner, StepResult
from alisa.engine.speculator import Speculator
from alisa.engine.status import EngineStatus, RequestView
from alisa.engine.step_prices import DraftedStep
from alisa.engine.threads import ThreadGovernor
from alisa.errors import InputError
from alisa.model.tokenizer import Tokenizer
from alisa.outputs import Medium, RequestOutput, TextDelta
from alisa.scheduler.chunks import request_index
from alisa.scheduler.plan import StepPlan
from alisa.scheduler.request import Request, RequestStatus
from alisa.scheduler.scheduler import Scheduler


class Engine:
    """Runs requests that are added and aborted at any time. One thread at a time may call it; see `SharedEngine`.

    Args:
        scheduler: who runs next, and where rows go.
        runner: the model with its cache.
        costs: what restoring a preempted sequence costs, learnt here.
        tokenizer: None: prompts are token ids, and no text comes out.
        prompts: checks what is asked.
        governor: chooses how many threads a step runs on.
        budgets: says how much a request may have read.
        eos_ids: token ids that end a request unless it ignores them.
        prefix_rules: of the session's prefix cache; None: it has none.
        answers: reads answers into that cache; None: there is none.
        speculator: says which tokens a step tries before it is known whether they come.
        drafter: makes up those that the speculator does not know; None: it knows all.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        costs: MeasuredCosts,
        tokenizer: Tokenizer | None,
        prompts: PromptReader,
        governor: ThreadGovernor,
        budgets: RequestBudgets,
        *,
        eos_ids: frozenset[int],
        prefix_rules: PrefixRules | None = None,
        answers: AnswerReader | None = None,
        speculator: Speculator,
        drafter: PolicyDrafter | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._session = runner.session
        self._costs = costs
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._governor = governor
        self._budgets = budgets
        self._eos_ids = eos_ids
        self._prefix_rules = prefix_rules
        self._answers = answers
        self._guides = GuideMaker(tokenizer, eos_ids)
        self._open: dict[str, OpenRequest] = {}
        self._names = itertools.count()
        self._chooser = TokenChooser(eos_ids, runner.timer)
        self._speculator = speculator
        self._drafter = drafter
        self._process = os.getpid()
        self._closed = False

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return self._prompts.max_model_len

    @property
    def has_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._open)

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        continues: bool = False,
        client: str = "",
        reading: ReadingParams = AS_CONFIGURED,
    ) -> str:
        """Queue a request; it starts as soon as there is room.

        Args:
            prompt: text, or token ids that are taken as they are.
            params: how to continue it.
            request_id: a name of the caller's; None: one is made.
            priority: lower ones are admitted first.
            cache_salt: the prefix cache shares nothing between requests with different ones.
            continues: another prompt is likely to begin with this one and its output, as in a conversation:
                `read_answer` then puts the output into the prefix cache, too.
            client: who sent it, for `EngineConfig.fair`.
            reading: how much its decode steps read, where that is less than the engine's options say.

        Returns:
            The request's name.

        Raises:
            RequestError: the prompt cannot be used.
            InputError: the name is taken, more than one text is asked for, its grammar cannot be used, it asks for a
                sparsity that is not to be had, or the engine is closed.
            CapacityError: the request cannot fit even when it runs alone.
        """
        self._check_usable()
        if params.n != 1:
            raise InputError(f"A request is one text, and n is {params.n}; add a request for each of them.")
        prompt_ids, max_new_tokens = self._prompts.read(prompt, params)
        budget = self._budgets.budget(reading)
        name = f"request-{next(self._names)}" if request_id is None else request_id
        request = Request(name, prompt_ids, params, max_new_tokens, priority, perf_counter())
        request.client, request.budget = client, budget
        if (rules := self._prefix_rules) is not None:
            request.block_names = rules.names(prompt_ids, request.num_rows, cache_salt)
            # Tokens that are restored give no logits.
            request.max_restored = 0 if params.prompt_logprobs is not None else rules.most(len(prompt_ids))
        text = RequestText(prompt, params, self._tokenizer)
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        ends = eos_ids | {*params.stop_ids, *text.stop_ids}
        opened = OpenRequest(text, ends, self._guides.guide(params), cache_salt if continues else None)
        self._stop_reading()
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
        if not self.has_requests:  # an answer may be half read, which is the work of `read_answer`
            return EngineOutput()
        self._governor.before_step()
        self._runner.timer.reset()
        self._speculator.propose(self.scheduler.running)
        plan = self.scheduler.schedule(self._session.cache)
        if plan is None:
            return EngineOutput()
        running = {request.req_idx: request for request in self.scheduler.running}
        requests = [running[chunk.req_idx] for chunk in plan.chunks]
        drafts = self._draft(plan, requests)
        plan = drafts.plan
        result = self._run(plan, requests)
        traffic = with_drafting(result.traffic, drafts.traffic)
        grown, failed = self._advance(plan, requests, result.logits, traffic)
        self._take_back(plan, grown)
        record = step_record(plan, traffic, self._runner, *_drafted(grown))
        self._costs.learn(record)
        # Sequences that catch up with what they had said say nothing about drafts.
        if not plan.prefill and plan.num_tokens == len(plan.chunks) + record.drafted_tokens:
            tried = [(one.request, one.num_drafts, one.num_accepted) for one in grown]
            step = DraftedStep(
                num_sequences=len(plan.chunks),
                num_tokens=plan.num_tokens,
                num_accepted=record.accepted_tokens,
                wall_s=record.wall_s,
                num_passes=drafts.num_passes,
                drafting_s=drafts.seconds,
            )
            self._speculator.learn(tried, step)
        deltas, finished = self._collect(plan, grown, failed)
        if not self.has_requests:
            self._governor.restore()
        return EngineOutput(deltas, finished, record, plan, tuple(request.request_id for request in requests))

    @torch.inference_mode()
    def read_answer(self) -> bool:
        """While no request is open: read on in what was said last, for the prefix cache; False: there is nothing to.

        A step of it is short. The next request that is added ends it.
        """
        self._check_usable()
        if self._answers is None or self.has_requests:
            return False
        self._governor.before_step()
        self._runner.timer.reset()
        has_read = self._answers.step()
        if not has_read:
            self._governor.restore()
        return has_read

    def status(self) -> EngineStatus:
        """What is going on; call it between steps."""
        cache, answers, now = self._session.cache, self._answers, perf_counter()
        return EngineStatus(
            tuple(_view(self.scheduler.requests[name], now) for name in self._open),
            device_bytes=cache.nbytes(Medium.DEVICE),
            host_bytes=cache.nbytes(Medium.HOST),
            disk_bytes=cache.nbytes(Medium.DISK),
            answer_tokens=0 if answers is None else answers.num_tokens,
            answer=None if answers is None else answers.view,
        )

    def close(self) -> None:
        """Requests are forgotten; rows, files and threads are given back. Closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._governor.restore()
            self._session.cache.close()

    def _stop_reading(self) -> None:
        if self._answers is not None:
            self._answers.stop()

    def _check_usable(self) -> None:
        if self._closed:
            raise InputError("This engine is closed; make another one.")
        if os.getpid() != self._process:
            raise InputError(
                "This model was loaded in another process, and its threads do not survive a fork; load it after the "
                "fork, or start processes with the method 'spawn'."
            )

    def _draft(self, plan: StepPlan, requests: Sequence[Request]) -> Drafts:
        """Drafts that the policy makes up, where the plan has room for some, and the plan that verifies them all."""
        if self._drafter is None or plan.prefill:
            return Drafts(plan)
        return self._drafter.draft(plan, requests, [self._open[request.request_id] for request in requests])

    def _run(self, plan: StepPlan, requests: Sequence[Request]) -> StepResult:
        """The plan's tokens have been through the model."""
        tokens = [r.tokens(c.start, c.end) for r, c in zip(requests, plan.chunks, strict=True)]
        # A prompt that is not read to its end, and a sequence that catches up with what it had said, choose no token.
        wanted = [max(c.end + 1 - len(r.token_ids), 0) for r, c in zip(requests, plan.chunks, strict=True)]
        opened = [self._open[request.request_id] for request in requests]
        kept = [n for n, chunk in enumerate(plan.chunks) if opened[n].wants_scores(requests[n], chunk)]
        result = self._runner.run(plan, tokens, wanted, kept)
        for number, hidden in result.kept.items():
            opened[number].score_prompt(requests[number], plan.chunks[number], hidden, self._runner.decoder.logits)
        return result

    def _advance(
        self, plan: StepPlan, requests: Sequence[Request], logits: Tensor, traffic: StepTraffic
    ) -> tuple[list[Grown], dict[int, str]]:
        """Every request that is up to date has its next tokens, or has failed.

        Returns:
            The requests that have grown, and the request indices that have failed, and why.
        """
        shape = self._session.shape
        for request, chunk, attended in zip(requests, plan.chunks, traffic.tokens_attended, strict=True):
            request.tokens_attended += attended
            request.tokens_dense += 0 if plan.prefill else dense_reads(shape, chunk)
        grown: list[Grown] = []
        num_rows = 0
        for request, chunk in zip(requests, plan.chunks, strict=True):
            num_drafts = chunk.end - len(request.token_ids)
            if num_drafts >= 0:
                grown.append(Grown(request, self._open[request.request_id], num_rows, num_drafts))
                num_rows += 1 + num_drafts
        self._chooser.choose(logits, grown, frozenset(traffic.failed))
        for one in grown:
            one.request.drafted_tokens += one.num_drafts
            one.request.accepted_tokens += one.num_accepted
        failed = {request_index(one.request): one.error for one in grown if one.error} | traffic.failed
        return [one for one in grown if one.token_ids], failed

    def _take_back(self, plan: StepPlan, grown: Sequence[Grown]) -> None:
        """No row is of a draft that did not come."""
        ends = {chunk.req_idx: chunk.end for chunk in plan.chunks}
        for request in (one.request for one in grown):
            req_idx, length = request_index(request), len(request.token_ids) - 1
            if length < ends[req_idx] and request.finish_reason is None:
                self._session.truncate(req_idx, length)

    def _collect(
        self, plan: StepPlan, grown: Sequence[Grown], failed: dict[int, str]
    ) -> tuple[tuple[TextDelta, ...], tuple[RequestOutput, ...]]:
        """Text of the step's tokens, and the requests that are over: they have left, with everything they held."""
        deltas = [one.delta for one in grown]
        finished = [one.request for one in grown if one.request.finish_reason is not None]
        lost = [r for r in (*self.scheduler.running, *self.scheduler.swapped) if r.req_idx in failed]
        self.scheduler.update(plan, finished, failed)
        outputs = []
        for request in (*finished, *lost):
            self._session.close(request_index(request))
            if rest := self._open[request.request_id].text.flush():  # of one that failed: the others have shown all
                deltas.append(TextDelta(0, rest, request.request_id))
            outputs.append(self._output(request))
        return tuple(deltas), tuple(outputs)

    def _output(self, request: Request) -> RequestOutput:
        self._speculator.forget(request.request_id)
        opened = self._open.pop(request.request_id)
        if self._answers is not None and opened.answer_salt is not None and request.finish_reason != "error":
            self._answers.add(request, opened.answer_salt)
        return opened.output(request)


def _drafted(grown: Sequence[Grown]) -> tuple[int, int]:
    """Drafts that were tried, and those that came."""
    return sum(one.num_drafts for one in grown), sum(one.num_accepted for one in grown)


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
