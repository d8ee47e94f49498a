"""One batch on the engine itself, wired as `LLM` wires it but with every choice open: what benchmarks run.

It needs no tokenizer and no files, so that a machine with little more than torch can run it, and it can switch off what
a user would never want off (prefetching, overlap), to show what that is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alisa.config import KvDtypeName, PolicyName, SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, Memory, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.engine.threads import make_governor
from alisa.kv.codec import make_codec
from alisa.model.decoder import Decoder
from alisa.policy.table import make_policy
from alisa.schedule.base import Scheduler
from alisa.types import RowFormat, StepRecord, Traffic

PARTS = ("linear", "attention", "selection", "transfer", "sampling", "other")
"""Of a step's time, as `StepRecord` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a batch is run."""

    policy: PolicyName
    sparsity: float
    kv_dtype: KvDtypeName = "auto"
    caps: Caps
    scheduler: Scheduler | None = None
    """None: what the caps demand."""
    prefetch: bool = True
    """Whether the next step's tokens are chosen a step ahead, where the policy allows it."""
    max_batch: int
    prefill_chunk: int = 1024


@dataclass(frozen=True, slots=True)
class Ran:
    """What happened."""

    records: tuple[StepRecord, ...]
    outputs: tuple[tuple[int, ...], ...]
    """New tokens of every prompt."""
    memory: Memory
    """Closed; says which store and scheduler there were."""

    @property
    def num_output(self) -> int:
        """Tokens that were generated."""
        return sum(map(len, self.outputs))

    @property
    def decode(self) -> list[StepRecord]:
        """Steps that decoded."""
        return [record for record in self.records if not record.prefill]

    def details(self) -> dict[str, object]:
        """Time of a mean decode step by part, memory by tier, and what moved, as plain values."""
        decode = self.decode
        traffic = sum((record.traffic for record in self.records), Traffic())
        phases = [str(record.phase) for record in decode]
        return {
            "parts_ms": {
                part: sum(getattr(record, f"{part}_s") for record in decode) / max(len(decode), 1) * 1e3
                for part in PARTS
            },
            "scheduler": self.memory.scheduler.name,
            "kv_peak_bytes": max(record.kv_bytes for record in self.records),
            "host_peak_bytes": max(record.host_bytes for record in self.records),
            "disk_peak_bytes": max(record.disk_bytes for record in self.records),
            "phases": {phase: phases.count(phase) for phase in dict.fromkeys(phases)},
            "num_preempted": sum(record.num_preempted for record in self.records),
            "fetched_rows": traffic.fetched_rows,
            "stored_rows": traffic.stored_rows,
            "deleted_rows": traffic.deleted_rows,
            "rebuilt_rows": traffic.rebuilt_rows,
            "moved_bytes": traffic.moved_bytes,
            "hit_rate": traffic.hit_rate,
            "hidden_share": traffic.hidden_share,
            "wait_s": traffic.wait_s,
            "read_share": sum(r.tokens_attended for r in decode) / max(sum(r.tokens_dense for r in decode), 1),
        }


def kv_dtype_of(decoder: Decoder, kv_dtype: KvDtypeName) -> str:
    """What rows are kept in."""
    return str(decoder.dtype).removeprefix("torch.") if kv_dtype == "auto" else kv_dtype


def run_batch(
    decoder: Decoder,
    setting: Setting,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    *,
    on_first: Callable[[int], None] = lambda index: None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Ran:
    """Every prompt has been continued greedily by exactly `output_len` tokens.

    Args:
        decoder: the model.
        setting: how.
        prompts: token ids.
        output_len: tokens for each.
        on_first: called with the index of a prompt when it has its first token.
        on_step: called after every step.

    Raises:
        AlisaError: it cannot be done under the caps.
    """
    sizes = [len(ids) + output_len - 1 for ids in prompts]
    num_lanes = min(setting.max_batch, len(prompts))
    policy = make_policy(setting.policy, setting.sparsity)
    kernels = choose_kernels(decoder.device)
    codec = make_codec(
        RowFormat(kv_dtype_of(decoder, setting.kv_dtype), decoder.spec.num_kv_heads, decoder.spec.head_dim)
    )
    memory = make_memory(decoder, policy, codec, kernels, sizes, setting.caps, setting.scheduler, num_lanes)
    state = policy.start(decoder.spec, num_lanes, max(sizes), decoder.device, kernels.selection)
    ahead = setting.prefetch and memory.scheduler.uses_tiers
    watch = Stopwatch()
    runner = Runner(decoder, policy, memory.store, state, kernels.prefill, kernels.attend, watch, looks_ahead=ahead)
    placement = Placement(memory.scheduler, memory.limits, memory.store, policy)
    engine = Engine(
        runner,
        placement,
        eos_ids=frozenset(),
        prefill_chunk=setting.prefill_chunk,
        governor=make_governor(),
    )
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    for index, ids in enumerate(prompts):
        engine.submit(Request(index, tuple(ids), params, output_len))
    records: list[StepRecord] = []
    outputs: list[tuple[int, ...]] = [()] * len(prompts)
    try:
        while (result := engine.step()) is not None:
            records.append(result.record)
            for sequence in result.advanced:
                index = sequence.request.request_id
                if not outputs[index]:
                    on_first(index)
                outputs[index] = tuple(sequence.output_ids)
            on_step(result.record)
    finally:
        memory.store.close()
    return Ran(tuple(records), tuple(outputs), memory)
