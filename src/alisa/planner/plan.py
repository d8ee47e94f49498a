"""A plan as plain values: does it fit, what moves when, how long it takes, what others take, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from alisa.planner.baselines import Baselines
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.draft_plan import plan_drafts
from alisa.planner.footprint import activation_bytes, hidden_row_bytes, kv_token_bytes, policy_bytes, weight_bytes
from alisa.planner.hardware import Hardware
from alisa.planner.load import RunConfig
from alisa.planner.search import PlanCandidate, SearchResult, search
from alisa.planner.simulate import MemoryBudget, UniformWorkload
from alisa.planner.sparse_reading import causal_pairs
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.file import schedule_values
from alisa.scheduler.simulate import PREFILL_CHUNK
from alisa.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is to be planned."""

    name: str
    """Of the model."""
    spec: ModelSpec
    workload: UniformWorkload
    hardware: Hardware
    methods: tuple[RunConfig, ...]
    """Ways to run the model among which the plan may choose; the first is the one that was asked for."""
    room: MemoryBudget | None = None
    """Caps of the rows; None: all that the machine has."""
    overlap: bool = True
    placement: PlacementPolicy | None = None
    """A schedule to price; None: the best one is searched for."""
    max_num_seqs: int | None = None
    """Sequences that may run together; None: as many as is best."""


def make_plan(question: PlanRequest) -> dict[str, Any]:
    """The record that `alisa plan --json` prints."""
    found = _search(question, question.workload, question.methods)
    serial = replace(question, overlap=False)
    record: dict[str, Any] = {
        "kind": "plan",
        "model": question.name,
        "hardware": question.hardware.name,
        "hardware_from": question.hardware.where,
        **asdict(question.workload),
        "overlap": question.overlap,
        "bytes": _bytes(question),
        "fits": found is not None,
    }
    if found is not None:
        best = found.best
        record |= {
            "policy": best.method.policy,
            "sparsity": best.method.sparsity,
            "kv_dtype": best.method.kv_dtype,
            "weight_dtype": best.method.products,
            "drafts": _drafts(question, best),
            "sparse_prompts": _sparse_prompts(question, best),
            "together": best.workload.batch,
            "waves": best.waves,
            "schedule": schedule_values(best.placement),
            **_switches(best),
            "device_kv_bytes": best.limits.device_tokens * kv_token_bytes(question.spec, best.method.kv_dtype),
            "seconds": best.seconds(overlap=question.overlap),
            "seconds_serial": best.seconds(overlap=serial.overlap),
            "tokens_per_s": best.tokens_per_s(overlap=question.overlap, num_tokens=question.workload.output_tokens),
            "prefill": cost_values(best.timeline.total(prefill=True).times(best.waves)),
            "decode": cost_values(best.timeline.total(prefill=False).times(best.waves)),
            "memory": list(_memory(question.spec, best)),
            "num_priced": found.num_priced,
            "notes": list(found.notes),
        }
    baselines = Baselines(
        question.spec, question.methods[0].dtype, question.hardware, question.workload, overlap=question.overlap
    )
    record["baselines"] = [
        {
            "name": baseline.name,
            "seconds": baseline.seconds,
            "tokens_per_s": question.workload.output_tokens / baseline.seconds if baseline.seconds else None,
            "note": baseline.note,
        }
        for baseline in baselines.all()
    ]
    record["helps"] = list(_helps(question, found))
    return record


def cost_values(cost: StepCost) -> dict[str, float]:
    """The parts of a cost, named as in `RunSummary`."""
    return {
        "linear_s": cost.linear_s,
        "attention_s": cost.attention_s,
        "selection_s": cost.selection_s,
        "transfer_s": cost.transfer_s,
        "sampling_s": cost.sampling_s,
        "other_s": cost.other_s,
        "fetch_s": cost.fetch_s,
        "store_s": cost.store_s,
        "rebuild_s": cost.rebuild_s,
        "hidden_s": cost.hidden_s,
        "total_s": cost.overlapped_s,
    }


def _drafts(question: PlanRequest, best: PlanCandidate) -> dict[str, Any] | None:
    """What a run that guesses ahead gains by it; None: it does not guess."""
    found = plan_drafts(question.spec, question.hardware, best, overlap=question.overlap)
    return None if found is None else asdict(found)


def _sparse_prompts(question: PlanRequest, best: PlanCandidate) -> dict[str, float] | None:
    """What is read of prompts, and the seconds that this saves; None: all of it."""
    sparse, length = best.method.sparse, best.workload.prompt_len
    if sparse is None:
        return None
    cost = CostModel(question.spec, best.method, question.hardware)
    prompts = [load for load in best.timeline.loads if load.prefill]
    densely = [replace(load, read_pairs=load.pairs) for load in prompts]
    dense_s, sparse_s = (sum(cost.step(load).attention_s for load in loads) for loads in (densely, prompts))
    return {
        "alpha": sparse.alpha,
        "late_share": sparse.share_left(length),
        "share": sparse.pairs(length) / causal_pairs(length),
        "saved_s": best.waves * (dense_s - sparse_s),
    }


def _search(question: PlanRequest, workload: UniformWorkload, methods: Sequence[RunConfig]) -> SearchResult | None:
    return search(
        question.spec,
        workload,
        question.hardware,
        methods,
        room=question.room,
        overlap=question.overlap,
        placement=question.placement,
        max_num_seqs=question.max_num_seqs,
    )


def _bytes(question: PlanRequest) -> dict[str, int]:
    spec, work, method = question.spec, question.workload, question.methods[0]
    tokens = min(PREFILL_CHUNK, work.batch * work.prompt_len)
    return {
        "weights": weight_bytes(
            spec, method.dtype, packs_tied=question.hardware.packs_tied, weight_dtype=method.weight_dtype
        ),
        "activations": activation_bytes(spec, method.dtype, work.batch, tokens),
        "policy": policy_bytes(spec, method.policy, method.sparsity, work.batch, work.num_rows),
        "kv_token": kv_token_bytes(spec, method.kv_dtype),
        "kv_all": work.batch * work.num_rows * kv_token_bytes(spec, method.kv_dtype),
        "hidden_token": spec.num_layers * hidden_row_bytes(spec, method.dtype),
        "device": question.hardware.device_bytes,
        "below": question.hardware.below_bytes,
    }


def _switches(best: PlanCandidate) -> dict[str, int | None]:
    """First generated token at which something lies below (p1) and at which something is deleted (p2)."""
    steps: dict[str, int | None] = {"offload_from": None, "recompute_from": None}
    output = 0.0
    for load, weight in zip(best.timeline.loads, best.timeline.weights, strict=True):
        if load.below_tokens + load.deleted_tokens and steps["offload_from"] is None:
            steps["offload_from"] = round(output)
        if load.deleted_tokens and steps["recompute_from"] is None:
            steps["recompute_from"] = round(output)
        output += weight
    return steps


def _memory(spec: ModelSpec, best: PlanCandidate) -> Iterator[dict[str, float | str]]:
    """Bytes of rows by tier after the steps that were priced."""
    token_bytes = kv_token_bytes(spec, best.method.kv_dtype)
    hidden_bytes = spec.num_layers * hidden_row_bytes(spec, best.method.dtype)
    output = 0.0
    for load, cost, weight in zip(best.timeline.loads, best.timeline.costs, best.timeline.weights, strict=True):
        yield {
            "step": round(output),
            "phase": str(load.phase),
            "device_bytes": load.device_tokens * token_bytes,
            "below_bytes": load.below_tokens * token_bytes + load.hidden_tokens * hidden_bytes,
            "deleted_bytes": load.deleted_tokens * token_bytes,
            "seconds": cost.overlapped_s,
        }
        output += weight


def _helps(question: PlanRequest, found: SearchResult | None) -> Iterator[dict[str, Any]]:
    """Changes that raise the rate, and by what factor."""
    base = question.methods[0]
    rate = found.best.tokens_per_s(overlap=question.overlap, num_tokens=question.workload.output_tokens) if found else 0
    half = replace(question.workload, batch=max(question.workload.batch // 2, 1))
    double = replace(question.workload, batch=2 * question.workload.batch)
    changes: list[tuple[str, UniformWorkload, list[RunConfig]]] = [
        (f"batch {half.batch}", half, list(question.methods)),
        (f"batch {double.batch}", double, list(question.methods)),
        ("INT8 rows", question.workload, [replace(base, kv_dtype="int8")]),
    ]
    if base.weight_dtype == "float" and "int8" in question.hardware.gemm:
        eight = [replace(method, weight_dtype="int8") for method in question.methods]
        changes.append(("INT8 weights", question.workload, eight))
    if base.policy != "dense":
        sparser = round(1 - (1 - base.sparsity) / 2, 3)
        changes.append(
            (
                f"sparsity {sparser:g}",
                question.workload,
                [replace(m, sparsity=sparser, layers=()) for m in question.methods],
            )
        )
    else:
        changes.append(
            ("sketch at sparsity 0.8", question.workload, [replace(base, policy="sketch", sparsity=0.8, layers=())])
        )
    for name, workload, methods in changes:
        other = _search(question, workload, methods)
        if other is None:
            continue
        new = other.best.tokens_per_s(overlap=question.overlap, num_tokens=workload.output_tokens)
        yield {"change": name, "tokens_per_s": new, "factor": new / rate if rate else None}
