"""A batch of random tokens through a model: whole steps to measure, no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.config import PolicyName, SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.kv.codec import make_codec
from alisa.model.decoder import Decoder
from alisa.policy.table import make_policy
from alisa.schedule.base import Limits, Scheduler
from alisa.schedule.rollout import PREFILL_CHUNK
from alisa.types import RowFormat, StepRecord


@dataclass(frozen=True, slots=True)
class Trial:
    """Equal prompts that all get as many tokens."""

    policy: PolicyName
    batch: int
    prompt_len: int
    output_len: int
    sparsity: float = 0.8
    kv_dtype: str = "bfloat16"
    cap: float = 1.0
    """Of the bytes that all rows take, the share that the device may hold; below 1 the rest goes to disk."""
    scheduler: Scheduler | None = None
    """None: whatever the cap demands."""

    @property
    def num_rows(self) -> int:
        """Tokens of a sequence that are cached in the end: the last one is returned, never fed."""
        return self.prompt_len + self.output_len - 1


@dataclass(frozen=True, slots=True)
class TrialRun:
    """What happened."""

    records: tuple[StepRecord, ...]
    scheduler: Scheduler
    limits: Limits


def run_trial(trial: Trial, decoder: Decoder, directory: Path, seed: int = 0) -> TrialRun:
    """Every step of the batch, with the kernels that this machine has.

    Args:
        trial: what to run.
        decoder: the model; random weights do as well as others.
        directory: whose disk takes what the device does not.
        seed: of the tokens.

    Raises:
        CapacityError: it does not fit.
    """
    spec = decoder.spec
    policy = make_policy(trial.policy, trial.sparsity)
    codec = make_codec(RowFormat(trial.kv_dtype, spec.num_kv_heads, spec.head_dim))
    kernels = choose_kernels(decoder.device)
    total = trial.batch * trial.num_rows * spec.num_layers * codec.format.row_bytes
    uses_disk = trial.cap < 1 or trial.scheduler is not None
    caps = Caps(int(trial.cap * total), 0, 2 * total if uses_disk else 0, directory)
    sizes = [trial.num_rows] * trial.batch
    memory = make_memory(decoder, policy, codec, kernels, sizes, caps, trial.scheduler, trial.batch)
    state = policy.start(spec, trial.batch, trial.num_rows, decoder.device, kernels.selection)
    ahead = memory.scheduler.uses_tiers
    runner = Runner(decoder, policy, memory.store, state, kernels.attend, Stopwatch(), looks_ahead=ahead)
    placement = Placement(memory.scheduler, memory.limits, memory.store, policy)
    engine = Engine(runner, placement, eos_ids=frozenset(), prefill_chunk=PREFILL_CHUNK)
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(max_tokens=trial.output_len, ignore_eos=True)
    for index in range(trial.batch):
        ids = torch.randint(10, spec.vocab_size, (trial.prompt_len,), generator=generator).tolist()
        engine.submit(Request(index, tuple(ids), params, trial.output_len))
    records = []
    while (result := engine.step()) is not None:
        records.append(result.record)
    memory.store.close()
    return TrialRun(tuple(records), memory.scheduler, memory.limits)
