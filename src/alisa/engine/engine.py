"""The step loop: sequences are admitted, read, decoded together, and leave; waiting ones join between steps."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from alisa.config import format_bytes
from alisa.engine.batching import Waiting, WaitingLine
from alisa.engine.placement import Placement
from alisa.engine.recorder import Part
from alisa.engine.requests import Request, Sequence
from alisa.engine.runner import PromptPiece, Runner
from alisa.engine.sampler import sample
from alisa.engine.threads import ThreadGovernor
from alisa.errors import CapacityError
from alisa.outputs import FinishReason
from alisa.schedule.work import Work, next_work
from alisa.types import Medium, StepPlan, StepRecord


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step was, what it took, and the sequences that got a token or ended."""

    plan: StepPlan
    record: StepRecord
    advanced: tuple[Sequence, ...]
    """Each got one token, the last of its `output_ids`, or ended with an error; the first tokens come from prefill."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Logits of sequences that went through the model, and what decode attention read (0 in prefill)."""

    logits: Tensor
    sequences: list[Sequence]
    tokens_attended: int = 0
    tokens_dense: int = 0


class Engine:
    """Runs requests: decides who takes part in a step, and what becomes of the tokens it gives.

    Args:
        runner: the model, its KV store and its selection policy.
        placement: where rows go, and who fits together.
        eos_ids: token ids that end a request unless it ignores them.
        prefill_chunk: prompt tokens in one pass at the most.
        governor: chooses how many threads a step runs on.
    """

    def __init__(
        self,
        runner: Runner,
        placement: Placement,
        *,
        eos_ids: frozenset[int],
        prefill_chunk: int,
        governor: ThreadGovernor,
    ) -> None:
        self._runner = runner
        self._store = runner.store
        self._watch = runner.watch
        self._placement = placement
        self._governor = governor
        self._eos_ids = eos_ids
        self._prefill_chunk = prefill_chunk
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []
        self._parked: list[Sequence] = []
        self._num_steps = 0
        self._num_preempted = 0

    def submit(self, request: Request) -> None:
        """Queue a request; it starts as soon as a lane and its rows are free.

        Raises:
            CapacityError: it needs more rows than the caps allow even when it runs alone.
        """
        if not self._placement.fits_alone(request.num_rows):
            limits, token_bytes = self._placement.limits, self._store.token_bytes
            caps = [f"{format_bytes(limits.device_tokens * token_bytes)} on the device"]
            caps += [f"{format_bytes(tier.num_tokens * token_bytes)} on {tier.medium}" for tier in limits.tiers]
            raise CapacityError(
                f"A request of {len(request.prompt_ids)} prompt and up to {request.max_new_tokens} new tokens needs "
                f"{format_bytes(request.num_rows * token_bytes)} of KV memory ({format_bytes(token_bytes)} a token) "
                f"and the cap is {' and '.join(caps)}; raise --kv-device-memory or --kv-disk-memory, or lower "
                "--max-tokens."
            )
        self._waiting.join(Waiting(request, perf_counter()))

    @torch.inference_mode()
    def step(self) -> StepResult | None:
        """Do the next piece of work; None when nothing is left to do."""
        self._governor.before_step()
        self._watch.reset()
        self._num_preempted = 0
        self._resume()
        self._admit()
        plan = self._plan()
        if plan is None:
            return None
        self._num_steps += 1
        by_lane = {sequence.lane: sequence for sequence in self._running}
        sequences = [by_lane[segment.lane] for segment in plan.segments]
        self._runner.begin(plan)
        done = self._read(plan, sequences) if plan.prefill else self._decode(plan, sequences)
        failed = self._fail()
        ready = [i for i, s in enumerate(done.sequences) if s.wants_token and s not in failed]
        advanced = [done.sequences[i] for i in ready]
        self._advance(advanced, done.logits[ready] if len(ready) < len(done.sequences) else done.logits)
        record = self._record(plan, done)
        self._placement.rates.learn(record)
        for sequence in (*advanced, *failed):
            if sequence.finish_reason is not None:
                self._leave(sequence)
        return StepResult(plan, record, (*advanced, *failed))

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a running sequence from outside: its text has reached a stop string."""
        if sequence.finish_reason is None:
            self._leave(sequence)
        sequence.finish_reason = reason

    def _plan(self) -> StepPlan | None:
        """What the next step does and moves; the newest sequences give way until it can be done."""
        while (work := next_work(self._running, self._prefill_chunk)) is not None:
            if self._placement.is_crowded(self._running) and self._park(work):
                continue
            decision = self._placement.decide(self._running, self._parked, work.segments)
            if decision is not None:
                return StepPlan(self._num_steps, decision.phase, work.prefill, work.segments, decision.moves)
            self._give_way()
        return None

    def _give_way(self) -> None:
        """Rows of the newest sequence are gone, and it has to wait; a parked one goes first."""
        if not self._parked and len(self._running) == 1:
            raise CapacityError("the only sequence that runs has no room, although it was found to fit when it came.")
        leaving = (self._parked or self._running).pop()
        self._num_preempted += 1
        leaving.num_preempted += 1
        self._store.release(leaving.lane)
        self._waiting.step_back(leaving)

    def _park(self, work: Work) -> bool:
        """Take the newest sequence out of the batch and keep its rows below, if that is possible and worth it."""
        newest = self._running[-1]
        others = [segment for segment in work.segments if segment.lane != newest.lane]
        fits = self._placement.decide(self._running[:-1], [*self._parked, newest], others) is not None
        if newest.in_prefill or not (fits and self._placement.keeps_rows(newest)):
            return False
        self._parked.append(self._running.pop())
        self._num_preempted += 1
        newest.num_preempted += 1
        return True

    def _resume(self) -> None:
        """Sequences that were taken out of the batch come back as soon as they do not crowd it, oldest first."""
        while self._parked and not self._placement.is_crowded([*self._running, self._parked[0]]):
            self._running.append(self._parked.pop(0))

    def _admit(self) -> None:
        while not self._parked and (waiting := self._waiting.first()) is not None and self._store.has_free_lane:
            if not self._placement.has_room(self._running, self._parked, len(waiting.request.prompt_ids)):
                return
            self._waiting.admit()
            request = waiting.request
            lane = self._store.open(request.num_rows)
            self._runner.state.open(lane, request.num_rows)
            sequence = waiting.former
            if sequence is None:
                sequence = Sequence(request, lane, waiting.since_s, perf_counter(), list(request.prompt_ids))
            sequence.lane, sequence.num_cached = lane, 0
            self._running.append(sequence)

    def _fail(self) -> list[Sequence]:
        """Sequences whose rows were lost in this step: they end with what they have."""
        failed = self._store.failed()
        lost = [sequence for sequence in (*self._running, *self._parked) if sequence.lane in failed]
        for sequence in lost:
            sequence.finish_reason = "error"
            sequence.error = failed[sequence.lane]
        return lost

    def _leave(self, sequence: Sequence) -> None:
        sequence.finished_s = perf_counter()
        if not sequence.output_ids:  # it failed while its prompt was read: all its time was prefill
            sequence.first_token_s = sequence.finished_s
        self._store.release(sequence.lane)
        (self._running if sequence in self._running else self._parked).remove(sequence)

    def _read(self, plan: StepPlan, sequences: list[Sequence]) -> _Pass:
        """Pass pieces of prompts through the model."""
        pieces = [
            PromptPiece(segment, sequence.token_ids[segment.start : segment.end], sequence.prompt_len)
            for segment, sequence in zip(plan.segments, sequences, strict=True)
        ]
        logits = self._runner.prefill(pieces)
        for segment, sequence in zip(plan.segments, sequences, strict=True):
            sequence.num_cached = segment.end
        return _Pass(logits, [sequence for sequence in sequences if not sequence.in_prefill])

    def _decode(self, plan: StepPlan, sequences: list[Sequence]) -> _Pass:
        """Pass one new token of every sequence through the model."""
        lanes = tuple(segment.lane for segment in plan.segments)
        lengths = tuple(segment.end for segment in plan.segments)
        tokens = [sequence.token_ids[sequence.num_cached] for sequence in sequences]
        logits, tokens_attended = self._runner.decode(lanes, lengths, tokens)
        for sequence, length, attended in zip(sequences, lengths, tokens_attended, strict=True):
            sequence.num_cached = length
            sequence.tokens_attended += attended
            sequence.tokens_dense += length * self._runner.decoder.spec.num_layers
        dense = sum(lengths) * self._runner.decoder.spec.num_layers
        return _Pass(logits, sequences, sum(tokens_attended), dense)

    def _advance(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Sample one token for each sequence and see whether it was the last."""
        if not sequences:
            return
        with self._watch.measure(Part.SAMPLING):
            chosen = sample(
                logits,
                [sequence.request.params for sequence in sequences],
                [sequence.token_ids for sequence in sequences],
                [len(sequence.output_ids) for sequence in sequences],
            )
        now = perf_counter()
        for sequence, token_id in zip(sequences, chosen, strict=True):
            if not sequence.output_ids:
                sequence.first_token_s = now
            sequence.append(token_id)
            sequence.finish_reason = self._finish_reason(sequence, token_id)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.request.params
        if token_id in self._eos_ids and not params.ignore_eos:
            return "eos"
        if token_id in params.stop_ids:
            return "stop"
        return "length" if len(sequence.output_ids) == sequence.request.max_new_tokens else None

    def _record(self, plan: StepPlan, done: _Pass) -> StepRecord:
        watch = self._watch
        attention_s, selection_s = watch.seconds(Part.ATTENTION), watch.seconds(Part.SELECTION)
        begin_s, transfer_s = watch.seconds(Part.BEGIN), watch.seconds(Part.TRANSFER)
        model_s, sampling_s, wall_s = watch.seconds(Part.MODEL), watch.seconds(Part.SAMPLING), watch.wall_s
        return StepRecord(
            step=plan.step,
            phase=plan.phase,
            prefill=plan.prefill,
            num_sequences=len(plan.segments),
            num_tokens=plan.num_tokens,
            tokens_attended=done.tokens_attended,
            tokens_dense=done.tokens_dense,
            kv_rows=self._store.used_rows,
            kv_bytes=self._store.nbytes(Medium.DEVICE),
            host_bytes=self._store.nbytes(Medium.HOST),
            disk_bytes=self._store.nbytes(Medium.DISK),
            deleted_tokens=self._store.deleted_tokens,
            num_preempted=self._num_preempted,
            traffic=self._store.traffic(),
            linear_s=model_s - attention_s - selection_s - transfer_s,
            attention_s=attention_s,
            selection_s=selection_s,
            transfer_s=transfer_s + begin_s,
            sampling_s=sampling_s,
            other_s=wall_s - model_s - sampling_s - begin_s,
            wall_s=wall_s,
        )
