"""The step loop: sequences are admitted, read, decoded together, and leave; waiting ones join between steps."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from alisa.config import format_bytes
from alisa.engine.batching import WaitingLine, next_plan
from alisa.engine.recorder import Part
from alisa.engine.requests import Request, Sequence
from alisa.engine.runner import PromptPiece, Runner
from alisa.engine.sampler import sample
from alisa.errors import CapacityError
from alisa.outputs import FinishReason
from alisa.types import Medium, StepPlan, StepRecord


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced: its record, the sequences that got a token, and those that ended."""

    record: StepRecord
    advanced: tuple[Sequence, ...]
    """Each got one token, the last of its `output_ids`; the first come from prefill steps."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Logits of the sequences that can sample a token now, and what decode attention read (0 in prefill)."""

    logits: Tensor
    ready: list[Sequence]
    tokens_attended: int = 0
    tokens_dense: int = 0


class Engine:
    """Runs requests: decides who takes part in a step, and what becomes of the tokens it gives.

    Args:
        runner: the model, its KV store and its selection policy; the store's free rows decide who can start.
        eos_ids: token ids that end a request unless it ignores them.
        prefill_chunk: prompt tokens in one pass at the most.
    """

    def __init__(self, runner: Runner, *, eos_ids: frozenset[int], prefill_chunk: int) -> None:
        self._runner = runner
        self._store = runner.store
        self._watch = runner.watch
        self._eos_ids = eos_ids
        self._prefill_chunk = prefill_chunk
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []
        self._num_steps = 0

    def submit(self, request: Request) -> None:
        """Queue a request; it starts as soon as a lane and its rows are free.

        Raises:
            CapacityError: it needs more rows than the cap allows even when it runs alone.
        """
        if request.num_rows > self._store.num_rows:
            needed, cap = (rows * self._store.token_bytes for rows in (request.num_rows, self._store.num_rows))
            raise CapacityError(
                f"A request of {len(request.prompt_ids)} prompt and up to {request.max_new_tokens} new tokens needs "
                f"{format_bytes(needed)} of KV memory ({format_bytes(self._store.token_bytes)} a token) and the cap is "
                f"{format_bytes(cap)}; raise --kv-device-memory or lower --max-tokens."
            )
        self._waiting.join(request, perf_counter())

    @torch.inference_mode()
    def step(self) -> StepResult | None:
        """Do the next piece of work; None when nothing is left to do."""
        self._watch.reset()
        self._admit()
        plan = next_plan(self._num_steps, self._running, self._prefill_chunk)
        if plan is None:
            return None
        self._num_steps += 1
        by_lane = {sequence.lane: sequence for sequence in self._running}
        sequences = [by_lane[segment.lane] for segment in plan.segments]
        done = self._read(plan, sequences) if plan.prefill else self._decode(plan, sequences)
        self._advance(done.ready, done.logits)
        record = self._record(plan, done)
        for sequence in done.ready:
            if sequence.finish_reason is not None:
                self._leave(sequence)
        return StepResult(record, tuple(done.ready))

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a running sequence from outside: its text has reached a stop string."""
        if sequence.finish_reason is None:
            self._leave(sequence)
        sequence.finish_reason = reason

    def _admit(self) -> None:
        while (request := self._waiting.first()) is not None and self._store.can_open(request.num_rows):
            _, submitted_s = self._waiting.admit()
            lane = self._store.open(request.num_rows)
            self._runner.state.open(lane, request.num_rows)
            self._running.append(Sequence(request, lane, submitted_s, perf_counter(), list(request.prompt_ids)))

    def _leave(self, sequence: Sequence) -> None:
        sequence.finished_s = perf_counter()
        self._store.release(sequence.lane)
        self._running.remove(sequence)

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
            linear_s=model_s - attention_s - selection_s,
            attention_s=attention_s,
            selection_s=selection_s,
            sampling_s=sampling_s,
            other_s=wall_s - model_s - sampling_s,
            wall_s=wall_s,
        )
