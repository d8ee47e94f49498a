"""One batch on the engine itself, wired as `LLM` wires it but with every choice open: what benchmarks run.

It needs no tokenizer and no files, so that a machine with little more than torch can run it, and it can switch off what
a user would never want off (prefetching, overlap), to show what that is good for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from alisa.attention.caps import lower_caps
from alisa.attention.kv_cache import KVCacheConfig, plan_kv_cache
from alisa.config import EngineConfig, SamplingParams
from alisa.engine.builder import CacheOptions, build_engine
from alisa.engine.engine import Engine
from alisa.engine.loaded import LoadedModel, kv_codec
from alisa.engine.report import EngineSetup
from alisa.errors import CapacityError
from alisa.kernels.choose import choose_backend
from alisa.model.decoder import Decoder
from alisa.outputs import StepRecord, Traffic
from alisa.policy.registry import make_policy

PARTS = ("linear", "attention", "selection", "transfer", "sampling", "other")
"""Of a step's time, as `StepRecord` names them."""

_MOST_BYTES = 1 << 50
"""More than any device has."""


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
            "kv_cap_bytes": self.setup.device_bytes,
            "policy_state_bytes": max(record.state_bytes for record in self.records),
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
    config = batch_config(run_spec.config, list(map(len, prompts)), output_len)
    engine, setup = build_engine(_loaded(decoder), config, run_spec.options)
    records: list[StepRecord] = []
    try:
        outputs = _finish(engine, prompts, output_len, records, on_first, on_step)
    finally:
        engine.close()
    return RunResult(tuple(records), outputs, setup)


def run_turns(
    decoder: Decoder,
    run_spec: RunSpec,
    turns: Sequence[Sequence[int]],
    output_len: int,
    *,
    on_turn: Callable[[], None] = lambda: None,
    on_first: Callable[[int], None] = lambda index: None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> RunResult:
    """A conversation without pauses, over a prefix cache: every turn has been answered by `output_len` tokens.

    Args:
        decoder: the model.
        run_spec: how; its sizes are those of the whole conversation.
        turns: token ids that are new in each.
        output_len: tokens of each answer.
        on_turn: called before each turn.
        on_first: called with the index of a turn when its answer has its first token.
        on_step: called after every step.

    Raises:
        AlisaError: it cannot be done under the caps.
    """
    config = replace(run_spec.config, prefix_cache=True)
    engine, setup = build_engine(_loaded(decoder), config, run_spec.options)
    records: list[StepRecord] = []
    answers: list[tuple[int, ...]] = []
    said: list[int] = []
    try:
        for index, ids in enumerate(turns):
            on_turn()
            said += ids

            def first(_: int, turn: int = index) -> None:
                on_first(turn)

            [answer] = _finish(engine, [said], output_len, records, first, on_step)
            answers.append(answer)
            said += answer
    finally:
        engine.close()
    return RunResult(tuple(records), tuple(answers), setup)


def _finish(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    records: list[StepRecord],
    on_first: Callable[[int], None],
    on_step: Callable[[StepRecord], None],
) -> tuple[tuple[int, ...], ...]:
    """The new tokens of prompts that are handed over together; `records` gets the steps."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    names = [engine.add_request(list(ids), params) for ids in prompts]
    while (record := (output := engine.step()).record) is not None:
        records.append(record)
        for delta in output.deltas:
            if delta.request_id not in outputs:
                on_first(names.index(delta.request_id))
            outputs.setdefault(delta.request_id, []).extend(delta.token_ids)
        on_step(record)
    return tuple(tuple(outputs[name]) for name in names)


def batch_config(config: EngineConfig, prompt_lens: Sequence[int], output_len: int) -> EngineConfig:
    """The configuration with the sizes of this batch."""
    return replace(
        config,
        max_num_seqs=min(config.max_num_seqs, len(prompt_lens)),
        max_model_len=max(prompt_lens) + output_len,
    )


def device_cap_for(decoder: Decoder, run_spec: RunSpec, num_tokens: int) -> int:
    """The smallest device cap in bytes under which the rows of so many tokens lie on the device.

    The cap also covers the policy's state, staging, tables and rows on their way; what they take depends on
    `max_num_seqs` and `max_model_len` (see `batch_config`), and on whether there are tiers, as the other caps say.

    Args:
        decoder: the model.
        run_spec: how it is run; its own device cap is not looked at.
        num_tokens: over all sequences; more than they can have is as many as they can have.

    Raises:
        CapacityError: no device is large enough, because the disk is too small for the schedule.
    """
    plan = _planner(decoder, run_spec)
    most = plan(_MOST_BYTES).limits.device_tokens
    return bisect_left(range(_MOST_BYTES), min(num_tokens, most), key=_or_zero(lambda n: plan(n).limits.device_tokens))


def device_cap_within(decoder: Decoder, run_spec: RunSpec, kv_bytes: int) -> int:
    """The largest device cap in bytes under which K and V, in rows and in staging, take no more than `kv_bytes`.

    This is what a budget for K and V alone comes to: policy state and tables are beside it. Where the budget holds
    everything, the cap is as large as everything, and no larger. Arguments and errors as in `device_cap_for`.
    """
    plan = _planner(decoder, run_spec)

    def taken(num_bytes: int) -> int:
        found = plan(num_bytes)
        rows = found.limits.device_tokens * decoder.spec.num_layers + found.capacity.staging_rows
        return rows * found.token_bytes // decoder.spec.num_layers

    whole = device_cap_for(decoder, run_spec, plan(_MOST_BYTES).limits.device_tokens)
    return bisect_right(range(whole + 1), kv_bytes, key=_or_zero(taken)) - 1


def device_tokens(decoder: Decoder, run_spec: RunSpec, num_bytes: int) -> int:
    """Tokens whose rows lie on the device under a cap of so many bytes; the other way round than `device_cap_for`.

    Raises:
        CapacityError: not even one.
    """
    return _planner(decoder, run_spec)(num_bytes).limits.device_tokens


def _planner(decoder: Decoder, run_spec: RunSpec) -> Callable[[int], KVCacheConfig]:
    """What the cache would be, by device cap."""
    model, config, options = _loaded(decoder), run_spec.config, run_spec.options
    policy, codec = make_policy(config.policy, config.sparsity, config.coverage), kv_codec(model, config)
    source, below = model.row_source, lower_caps(config, decoder.device, options.host_bytes)
    return lambda num_bytes: plan_kv_cache(source, policy, codec, config, options.placement, num_bytes, *below)


def _or_zero(figure: Callable[[int], int]) -> Callable[[int], int]:
    """The figure of a cap, 0 where the cap holds nothing."""

    def or_zero(num_bytes: int) -> int:
        try:
            return figure(num_bytes)
        except CapacityError:
            return 0

    return or_zero


def kv_dtype_of(decoder: Decoder, config: EngineConfig) -> str:
    """What rows are kept in."""
    return kv_codec(_loaded(decoder), config).format.dtype


def _loaded(decoder: Decoder) -> LoadedModel:
    """A model without a name or a tokenizer."""
    return LoadedModel("", decoder, None, choose_backend(decoder.device))
