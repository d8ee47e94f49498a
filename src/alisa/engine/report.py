"""What a run was: every step, and the totals."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from alisa.attention.session import StepTraffic
from alisa.attention.timing import StepSection
from alisa.config import PolicyName, WeightFormat
from alisa.engine.runner import ModelRunner
from alisa.outputs import Medium, RunSummary, StepRecord, Traffic
from alisa.scheduler.placement.base import Limits, PlacementPolicy
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.spec import AttentionShape, ModelSpec


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine was built as: everything that was `auto` is resolved."""

    spec: ModelSpec
    policy: PolicyName
    sparsity: float
    dtype: str
    """What the model computes in."""
    weight_format: WeightFormat
    """What its linear layers are kept in."""
    kv_dtype: str
    placement: PlacementPolicy
    limits: Limits
    device_bytes: int
    """Hard cap of everything on the device that grows with tokens: rows, policy state, buffers."""
    host_bytes: int
    """Size of the host tier; 0 without one."""
    disk_bytes: int
    """Most bytes on disk, hidden states included; 0 without a disk tier."""
    prefix_bytes: int = 0
    """Hard cap of the prefix cache, in addition to those above; 0 without one."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """Some requests from the first step that one of them took part in to the last.

    Steps that were shared with other requests count whole; tokens are those of these requests alone.
    """

    setup: EngineSetup
    summary: RunSummary
    records: tuple[StepRecord, ...]
    plans: tuple[StepPlan, ...]


def dense_reads(shape: AttentionShape, chunk: ScheduledChunk) -> int:
    """Cached tokens that dense attention reads in a decode step of this chunk, summed over layers."""
    return sum(shape.dense_reads(length) for length in range(chunk.start + 1, chunk.end + 1))


def step_record(
    plan: StepPlan, traffic: StepTraffic, runner: ModelRunner, drafted: int = 0, accepted: int = 0
) -> StepRecord:
    """What a step did and took, measured; call it when everything but the outputs is done.

    Args:
        plan: of the step.
        traffic: what it read and moved.
        runner: which made it.
        drafted: tokens that were tried before it was known whether they would come.
        accepted: those that came.
    """
    timer, cache = runner.timer, runner.session.cache
    attention_s, selection_s = timer.seconds(StepSection.ATTENTION), timer.seconds(StepSection.SELECTION)
    begin_s, transfer_s = timer.seconds(StepSection.BEGIN), timer.seconds(StepSection.TRANSFER)
    model_s, sampling_s = timer.seconds(StepSection.MODEL), timer.seconds(StepSection.SAMPLING)
    wall_s = timer.wall_s
    shape, prefix = runner.session.shape, runner.session.prefix
    return StepRecord(
        step=plan.step,
        phase=plan.phase,
        prefill=plan.prefill,
        num_sequences=len(plan.chunks),
        num_tokens=0 if plan.restored else plan.num_tokens,
        tokens_attended=sum(traffic.tokens_attended),
        tokens_dense=0 if plan.prefill else sum(dense_reads(shape, chunk) for chunk in plan.chunks),
        kv_rows=cache.store.used_rows,
        kv_bytes=cache.nbytes(Medium.DEVICE),
        host_bytes=cache.nbytes(Medium.HOST),
        disk_bytes=cache.nbytes(Medium.DISK),
        deleted_tokens=cache.store.deleted_tokens,
        num_preempted=plan.num_preempted,
        traffic=traffic.traffic,
        linear_s=model_s - attention_s - selection_s - transfer_s - begin_s,
        attention_s=attention_s,
        selection_s=selection_s,
        transfer_s=transfer_s + begin_s,
        sampling_s=sampling_s,
        other_s=wall_s - model_s - sampling_s,
        wall_s=wall_s,
        state_bytes=runner.session.state.nbytes,
        cached_tokens=plan.num_tokens if plan.restored else 0,
        prefix_bytes=0 if prefix is None else prefix.nbytes,
        drafted_tokens=drafted,
        accepted_tokens=accepted,
        covered=traffic.covered,
    )


def run_report(
    setup: EngineSetup,
    records: Sequence[StepRecord],
    plans: Sequence[StepPlan],
    *,
    num_requests: int,
    prompt_tokens: int,
    output_tokens: int,
    wall_s: float,
) -> RunReport:
    """The totals of these steps and requests."""
    prefill = [record for record in records if record.prefill]
    decode = [record for record in records if not record.prefill]
    summary = RunSummary(
        num_requests=num_requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        wall_s=wall_s,
        prefill_s=sum(record.wall_s for record in prefill),
        decode_s=sum(record.wall_s for record in decode),
        linear_s=sum(record.linear_s for record in decode),
        attention_s=sum(record.attention_s for record in decode),
        selection_s=sum(record.selection_s for record in decode),
        transfer_s=sum(record.transfer_s for record in decode),
        sampling_s=sum(record.sampling_s for record in decode),
        other_s=sum(record.other_s for record in decode),
        decode_tokens=sum(record.num_tokens - record.drafted_tokens + record.accepted_tokens for record in decode),
        kv_cap_bytes=setup.device_bytes,
        kv_peak_bytes=max((record.kv_bytes for record in records), default=0),
        host_cap_bytes=setup.host_bytes,
        host_peak_bytes=max((record.host_bytes for record in records), default=0),
        disk_cap_bytes=setup.disk_bytes,
        disk_peak_bytes=max((record.disk_bytes for record in records), default=0),
        phase_steps=dict(Counter(str(record.phase) for record in decode)),
        num_preempted=sum(record.num_preempted for record in records),
        traffic=sum((record.traffic for record in records), Traffic()),
        policy_state_bytes=max((record.state_bytes for record in records), default=0),
        tokens_attended=sum(record.tokens_attended for record in decode),
        tokens_dense=sum(record.tokens_dense for record in decode),
        peak_rss_bytes=_peak_rss_bytes(),
        cached_tokens=sum(record.cached_tokens for record in records),
        prefix_cap_bytes=setup.prefix_bytes,
        prefix_peak_bytes=max((record.prefix_bytes for record in records), default=0),
        decode_sequences=sum(record.num_sequences for record in decode),
        drafted_tokens=sum(record.drafted_tokens for record in decode),
        accepted_tokens=sum(record.accepted_tokens for record in decode),
        covered=_covered(decode),
    )
    return RunReport(setup, summary, tuple(records), tuple(plans))


def _covered(decode: Sequence[StepRecord]) -> float | None:
    """Mean over the sequences of all steps."""
    known = [(record.covered, record.num_sequences) for record in decode if record.covered is not None]
    return sum(covered * count for covered, count in known) / sum(count for _, count in known) if known else None


def _peak_rss_bytes() -> int:
    """Most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
