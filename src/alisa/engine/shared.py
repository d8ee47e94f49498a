"""One engine for many callers in any threads: whoever waits for output makes the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from weakref import WeakValueDictionary

from alisa.config import SamplingParams, sample_params
from alisa.engine.engine import Engine
from alisa.engine.output import EngineOutput
from alisa.engine.report import EngineSetup, RunReport, run_report
from alisa.errors import PromptError, RequestError
from alisa.outputs import RequestOutput, StepRecord, TextDelta
from alisa.scheduler.plan import StepPlan

Event = TextDelta | RequestOutput


class SharedEngine:
    """An engine behind a lock, and the streams of those who use it.

    Args:
        engine: nobody else calls it.
        setup: what it was built as.
    """

    def __init__(self, engine: Engine, setup: EngineSetup) -> None:
        self.setup = setup
        self._engine = engine
        self._lock = threading.Lock()
        # Weak: a stream that its reader drops is to be aborted, not kept alive by what it waits for.
        self._streams: WeakValueDictionary[str, Stream] = WeakValueDictionary()
        self._dropped: deque[str] = deque()

    def stream(
        self, prompts: Sequence[str | Sequence[int]], params: Sequence[SamplingParams], *, continues: bool = False
    ) -> Stream:
        """All requests are queued, or none is; `continues` as in `Engine.add_request`.

        Raises:
            PromptError: a prompt cannot be used.
            CapacityError: a request cannot fit even when it runs alone.
        """
        names: dict[str, tuple[int, int]] = {}
        with self._lock:
            try:
                for index, (prompt, rules) in enumerate(zip(prompts, params, strict=True)):
                    try:
                        for sample in range(rules.n):
                            name = self._engine.add_request(prompt, sample_params(rules, sample), continues=continues)
                            names[name] = index, sample
                    except RequestError as error:
                        raise PromptError(index, error.problem) from error
            except BaseException:
                for name in names:
                    self._engine.abort(name)
                raise
            prompt_tokens = sum(self._engine.scheduler.requests[name].prompt_len for name in names)
            stream = Stream(self, names, prompt_tokens)
            self._streams.update(dict.fromkeys(names, stream))
        return stream

    def wait(self, ready: Callable[[], bool]) -> None:
        """Steps have been made, by this thread or another, until `ready` is true or nothing is left to do."""
        while True:
            with self._lock:
                self._abort_dropped()
                if ready() or not self._engine.has_requests:
                    return
                self._deliver(self._engine.step())

    def abort(self, request_ids: Sequence[str]) -> None:
        """These requests are over: now, or after the step that another thread is making."""
        # Called by the garbage collector too, which may run while this very thread makes a step: never waits.
        self._dropped.extend(request_ids)
        if self._lock.acquire(blocking=False):
            try:
                self._abort_dropped()
            finally:
                self._lock.release()

    def read_answer(self) -> bool:
        """See `Engine.read_answer`; false, too, while another thread makes a step."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._engine.read_answer()
        finally:
            self._lock.release()

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or running."""
        return not self._engine.has_requests

    def close(self) -> None:
        """Every request is aborted, and what the engine held is given back."""
        with self._lock:
            self._streams.clear()
            self._engine.close()

    def _abort_dropped(self) -> None:
        while self._dropped:
            self._engine.abort(self._dropped.popleft())

    def _deliver(self, output: EngineOutput) -> None:
        if output.record is None or output.plan is None:
            return
        # A request that is swapped takes part in no step, and may fail all the same.
        names = {*output.request_ids, *(done.request_id for done in output.finished)}
        streams = {name: stream for name in names if (stream := self._streams.get(name)) is not None}
        for stream in set(streams.values()):
            stream.saw(output.record, output.plan)
        for event in (*output.deltas, *output.finished):
            if event.request_id in streams:
                streams[event.request_id].take(event)


class Stream:
    """The events of some requests, as they come: text of running ones, and finished ones in any order.

    One thread at a time may read it. Closing it, or dropping it half way, aborts what has not finished.
    """

    def __init__(self, engine: SharedEngine, request_ids: Mapping[str, tuple[int, int]], prompt_tokens: int) -> None:
        self._engine = engine
        # Of each request: the place of its prompt, and which of the texts for it.
        self._places = dict(request_ids)
        self._open = set(request_ids)
        self._events: deque[Event] = deque()
        self._records: list[StepRecord] = []
        self._plans: list[StepPlan] = []
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._started = perf_counter()
        self._ended: float | None = None

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        self._engine.wait(lambda: bool(self._events) or not self._open)
        if not self._events:
            raise StopIteration
        return self._events.popleft()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def take(self, event: Event) -> None:
        """One of the requests has grown or finished; called by whoever made the step."""
        index, sample = self._places[event.request_id]
        if isinstance(event, TextDelta):
            self._output_tokens += len(event.token_ids)
            if event.text:
                # Written out: `replace` costs five times as much, for every token.
                self._events.append(
                    TextDelta(index, event.text, event.request_id, event.token_ids, sample, event.logprobs)
                )
            return
        self._open.discard(event.request_id)
        if not self._open:
            self._ended = perf_counter()
        self._events.append(replace(event, index=index, sample=sample))

    def saw(self, record: StepRecord, plan: StepPlan) -> None:
        """One of the requests took part in this step."""
        self._records.append(record)
        self._plans.append(plan)

    def close(self) -> None:
        """What has not finished is aborted; there are no more events. Closing again does nothing."""
        if self._open:
            self._engine.abort(tuple(self._open))
            self._open.clear()
            self._ended = perf_counter()
        self._events.clear()

    def report(self) -> RunReport:
        """The steps and totals so far; of a stream that was closed, up to there."""
        return run_report(
            self._engine.setup,
            self._records,
            self._plans,
            num_requests=len(self._places),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            wall_s=(self._ended or perf_counter()) - self._started,
        )
