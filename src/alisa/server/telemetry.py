"""What a server tells of itself: Prometheus metrics by the names that vLLM gave them, and a history for its page.

The engine's thread feeds it after each step; whoever asks reads what is there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, perf_counter, time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from alisa.engine.output import EngineOutput
from alisa.engine.status import EngineStatus
from alisa.outputs import RequestOutput, StepRecord

HISTORY_S = 300
"""Seconds that the page looks back."""
HISTORY_REQUESTS = 100

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_REASONS = {"eos": "stop"}


@dataclass(frozen=True, slots=True)
class Second:
    """What happened in one second."""

    at: int
    """Seconds since 1970."""
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_attended: int = 0
    tokens_dense: int = 0
    lookups: int = 0
    hits: int = 0
    fetched_rows: int = 0
    kv_rows: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    phase: str = ""
    busy_s: float = 0.0

    def after(self, record: StepRecord, prompt_tokens: int, output_tokens: int) -> Second:
        """With one step more."""
        return replace(
            self,
            steps=self.steps + 1,
            prompt_tokens=self.prompt_tokens + prompt_tokens,
            output_tokens=self.output_tokens + output_tokens,
            tokens_attended=self.tokens_attended + record.tokens_attended,
            tokens_dense=self.tokens_dense + record.tokens_dense,
            lookups=self.lookups + record.traffic.lookups,
            hits=self.hits + record.traffic.hits,
            fetched_rows=self.fetched_rows + record.traffic.fetched_rows,
            kv_rows=record.kv_rows,
            device_bytes=record.kv_bytes,
            host_bytes=record.host_bytes,
            disk_bytes=record.disk_bytes,
            phase=str(record.phase),
            busy_s=self.busy_s + record.wall_s,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is over, without its text."""

    request_id: str
    finish_reason: str
    ended_at: float
    """Seconds since 1970."""
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float


class Telemetry:
    """Counters and history of one engine.

    Args:
        model: its name for clients.
        pool_bytes: of the device's pool at most.
        clock: seconds since 1970.
        engine: name of the engine, where there are several behind one address.
    """

    def __init__(self, model: str, pool_bytes: int, clock: Callable[[], float] = time, *, engine: str = "0") -> None:
        self._pool_bytes = pool_bytes
        self._clock = clock
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": engine}
        self._lock = threading.Lock()
        self._seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self._finished: deque[Finished] = deque(maxlen=HISTORY_REQUESTS)
        self._last_token: dict[str, float] = {}
        self._started = monotonic()
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self._running = gauge("vllm:num_requests_running", "Requests that take part in steps.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that wait for room.")
        self._swapped = gauge("alisa:num_requests_swapped", "Requests that keep their rows and wait.")
        self._usage = gauge("vllm:kv_cache_usage_perc", "Part of the device's pool that is in use, 0 to 1.")
        self._tiers = {
            name: gauge(f"alisa:kv_{name}_bytes", f"Bytes of K and V in the tier {name}.")
            for name in ("device", "host", "disk")
        }
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts that were read.")
        self._cached_tokens = counter("vllm:prompt_tokens_cached", "Of these, whose K and V came from a cache.")
        self._prefix_queries = counter("vllm:prefix_cache_queries", "Tokens of prompts of requests that ended.")
        self._prefix_hits = counter("vllm:prefix_cache_hits", "Of these, whose K and V came from the prefix cache.")
        self._answer_tokens = counter("alisa:answer_tokens_read", "Tokens of answers read while nobody waited.")
        self._answer_tokens_told = 0
        self._prefix_bytes = gauge("alisa:prefix_cache_bytes", "Bytes of the prefix cache.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens that were generated.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens that were tried ahead of their turn.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Those of them that came.")
        self._preemptions = counter("vllm:num_preemptions", "Requests that made room for others.")
        self._attended = counter("alisa:kv_tokens_attended", "Cached tokens that decode attention read.")
        self._dense = counter("alisa:kv_tokens_dense", "What dense attention would have read.")
        self._fetched = counter("alisa:kv_fetched_rows", "Rows read from a lower tier.")
        self._lookups = counter("alisa:hot_cache_lookups", "Selected rows that are in a lower tier.")
        self._hits = counter("alisa:hot_cache_hits", "Those of them that the hot cache held.")
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended, by why.",
            [*self._labels, "finished_reason"],
            registry=self._registry,
        )
        self._first_token = histogram("vllm:time_to_first_token_seconds", "From arrival.", _SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS)
        self._per_token = histogram("vllm:request_time_per_output_token_seconds", "Mean of a request.", _SECONDS)
        self._end_to_end = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _LONG_SECONDS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Waiting.", _LONG_SECONDS)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "Until the first token.", _LONG_SECONDS)
        self._decode = histogram("vllm:request_decode_time_seconds", "After the first token.", _LONG_SECONDS)
        self._inference = histogram("vllm:request_inference_time_seconds", "Without waiting.", _LONG_SECONDS)
        self._prompt_len = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._output_len = histogram("vllm:request_generation_tokens", "Tokens of an output.", _TOKENS)
        self._iteration = histogram("vllm:iteration_tokens_total", "Tokens of a step.", _TOKENS)
        self._loop_lag = histogram("alisa:event_loop_lag_seconds", "How late the event loop wakes.", _SECONDS)

    def observe(self, output: EngineOutput) -> None:
        """Take in what came out of the engine; called by its thread."""
        now = perf_counter()
        if output.record is not None:
            prompt_tokens = output.record.num_tokens if output.record.prefill else 0
            output_tokens = sum(len(delta.token_ids) for delta in output.deltas)
            self._take_step(output.record, prompt_tokens, output_tokens)
        for delta in output.deltas:
            if delta.token_ids:
                before = self._last_token.get(delta.request_id)
                self._last_token[delta.request_id] = now
                if before is not None:
                    for _ in delta.token_ids:
                        self._between.observe((now - before) / len(delta.token_ids))
        for finished in output.finished:
            self._take_finished(finished)

    def observe_lag(self, late_s: float) -> None:
        """The event loop was woken so much later than it had asked for."""
        self._loop_lag.observe(late_s)

    def exposition(self, status: EngineStatus) -> bytes:
        """All metrics in the text format of Prometheus."""
        self._running.set(status.count("prefill", "decode"))
        self._waiting.set(status.count("waiting"))
        self._swapped.set(status.count("swapped"))
        self._usage.set(status.device_bytes / self._pool_bytes if self._pool_bytes else 0)
        for name, num_bytes in zip(
            self._tiers, (status.device_bytes, status.host_bytes, status.disk_bytes), strict=True
        ):
            self._tiers[name].set(num_bytes)
        with self._lock:
            self._answer_tokens.inc(status.answer_tokens - self._answer_tokens_told)
            self._answer_tokens_told = status.answer_tokens
        return generate_latest(self._registry)

    def seconds(self) -> list[Second]:
        """The last minutes, the oldest second first; seconds without a step are left out."""
        with self._lock:
            return list(self._seconds)

    def finished(self) -> list[Finished]:
        """The last requests that ended, the newest first."""
        with self._lock:
            return list(reversed(self._finished))

    @property
    def uptime_s(self) -> float:
        """Since this was made."""
        return monotonic() - self._started

    def _take_step(self, record: StepRecord, prompt_tokens: int, output_tokens: int) -> None:
        second = int(self._clock())
        with self._lock:
            last = self._seconds.pop() if self._seconds and self._seconds[-1].at == second else Second(second)
            self._seconds.append(last.after(record, prompt_tokens, output_tokens))
        self._prompt_tokens.inc(prompt_tokens)
        self._generation_tokens.inc(output_tokens)
        self._drafted.inc(record.drafted_tokens)
        self._accepted.inc(record.accepted_tokens)
        self._preemptions.inc(record.num_preempted)
        self._prefix_bytes.set(record.prefix_bytes)
        self._attended.inc(record.tokens_attended)
        self._dense.inc(record.tokens_dense)
        self._fetched.inc(record.traffic.fetched_rows)
        self._lookups.inc(record.traffic.lookups)
        self._hits.inc(record.traffic.hits)
        self._iteration.observe(record.num_tokens)

    def _take_finished(self, output: RequestOutput) -> None:
        report = output.report
        self._last_token.pop(output.request_id, None)
        reason = _REASONS.get(output.finish_reason, output.finish_reason)
        with self._lock:
            self._finished.append(
                Finished(
                    request_id=output.request_id,
                    finish_reason=reason,
                    ended_at=self._clock(),
                    prompt_tokens=report.prompt_tokens,
                    output_tokens=report.output_tokens,
                    cached_tokens=report.cached_tokens,
                    queue_s=report.queue_s,
                    prefill_s=report.prefill_s,
                    decode_s=report.decode_s,
                )
            )
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._cached_tokens.inc(report.cached_tokens)
        self._prefix_queries.inc(report.prompt_tokens)
        self._prefix_hits.inc(report.cached_tokens)
        self._prompt_len.observe(report.prompt_tokens)
        self._output_len.observe(report.output_tokens)
        self._queue.observe(report.queue_s)
        if not report.output_tokens:
            return
        self._first_token.observe(report.first_token_s)
        self._prefill.observe(report.prefill_s)
        self._decode.observe(report.decode_s)
        self._inference.observe(report.prefill_s + report.decode_s)
        self._end_to_end.observe(report.first_token_s + report.decode_s)
        if report.output_tokens > 1:
            self._per_token.observe(report.decode_s / (report.output_tokens - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, list(self._labels), registry=self._registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[Any, ...]) -> Histogram:
        labelled = Histogram(name, text, list(self._labels), registry=self._registry, buckets=buckets)
        return labelled.labels(**self._labels)
