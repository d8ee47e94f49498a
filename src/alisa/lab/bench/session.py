"""One batch on the engine itself, wired as `LLM` wires it but with every choice open: what benchmarks run.

It needs no tokenizer and no files, so that a machine with little more than torch can run it, and it can switch off what
a user would never want off (prefetching, overlap), to show what that is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from alisa.config import EngineConfig, SamplingParams
from alisa.engine.builder import CacheOptions, build_engine
from alisa.engine.loaded import LoadedModel, kv_codec
from alisa.engine.report import EngineSetup
from alisa.kernels.choose import choose_backend
from alisa.model.decoder import Decoder
from alisa.outputs import StepRecord, Traffic

PARTS = ("linear", "attention", "selection", "transfer", "sampling", "other")
"""Of a step's time, as `StepRecord` names them."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """How a batch is run."""

    config: EngineConfig
    """`max_num_seqs` and `max_model_len` come down to what the batch needs."""
    options: CacheOptions = field(default_factory=CacheOptions)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What happened."""

    records: tuple[StepRecord, ...]
    outputs: tuple[tuple[int, ...], ...]
    """New tokens of every prompt."""
    setup: EngineSetup
    """What the engine was built as."""

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
            "scheduler": self.setup.placement.name,
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


def run_batch(
    decoder: Decoder,
    run_spec: RunSpec,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    *,
    on_first: Callable[[int], None] = lambda index: None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> RunResult:
    """Every prompt has been continued greedily by exactly `output_len` tokens.

    Args:
        decoder: the model.
        run_spec: how.
        prompts: token ids.
        output_len: tokens for each.
        on_first: called with the index of a prompt when it has its first token.
        on_step: called after every step.

    Raises:
        AlisaError: it cannot be done under the caps.
    """
    model = LoadedModel("", decoder, None, choose_backend(decoder.device))
    config = replace(
        run_spec.config,
        max_num_seqs=min(run_spec.config.max_num_seqs, len(prompts)),
        max_model_len=max(map(len, prompts)) + output_len,
    )
    engine, setup = build_engine(model, config, run_spec.options)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    records: list[StepRecord] = []
    outputs: dict[str, list[int]] = {}
    try:
        names = [engine.add_request(list(ids), params) for ids in prompts]
        while (record := (output := engine.step()).record) is not None:
            records.append(record)
            for delta in output.deltas:
                if delta.request_id not in outputs:
                    on_first(names.index(delta.request_id))
                outputs.setdefault(delta.request_id, []).extend(delta.token_ids)
            on_step(record)
    finally:
        engine.close()
    return RunResult(tuple(records), tuple(tuple(outputs[name]) for name in names), setup)


def kv_dtype_of(decoder: Decoder, config: EngineConfig) -> str:
    """What rows are kept in."""
    return kv_codec(LoadedModel("", decoder, None, choose_backend(decoder.device)), config).format.dtype
