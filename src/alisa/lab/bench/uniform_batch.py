"""Equal random prompts under a share of the memory they need: whole steps to measure, no text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alisa.config import EngineConfig, KvDtypeName, PolicyName
from alisa.engine.builder import CacheOptions
from alisa.lab.bench.session import RunResult, RunSpec, batch_config, device_cap_within, run_batch
from alisa.model.decoder import Decoder
from alisa.planner.footprint import kv_token_bytes
from alisa.scheduler.placement.base import PlacementPolicy


@dataclass(frozen=True, slots=True)
class UniformBatch:
    """Equal prompts that all get as many tokens."""

    policy: PolicyName
    batch: int
    prompt_len: int
    output_len: int
    sparsity: float = 0.8
    kv_dtype: KvDtypeName = "bfloat16"
    cap: float = 1.0
    """Of the bytes that all rows take, the share that K and V may take on the device; below 1 the rest goes to disk."""
    scheduler: PlacementPolicy | None = None
    """None: whatever the cap demands."""

    @property
    def num_rows(self) -> int:
        """Tokens of a sequence that are cached in the end: the last one is returned, never fed."""
        return self.prompt_len + self.output_len - 1


def run_uniform_batch(uniform: UniformBatch, decoder: Decoder, directory: Path, seed: int = 0) -> RunResult:
    """Every step of the batch, with the kernels that this machine has.

    Args:
        uniform: what to run.
        decoder: the model; random weights do as well as others.
        directory: whose disk takes what the device does not.
        seed: of the tokens.

    Raises:
        CapacityError: it does not fit.
    """
    spec = decoder.spec
    total = uniform.batch * uniform.num_rows * kv_token_bytes(spec, uniform.kv_dtype)
    uses_disk = uniform.cap < 1 or uniform.scheduler is not None
    config = EngineConfig(
        policy=uniform.policy,
        sparsity=uniform.sparsity,
        kv_dtype=uniform.kv_dtype,
        kv_disk_memory=2 * total if uses_disk else 0,
        kv_disk_path=directory,
        max_num_seqs=uniform.batch,
    )
    config = batch_config(config, [uniform.prompt_len] * uniform.batch, uniform.output_len)
    run_spec = RunSpec(config, CacheOptions(placement=uniform.scheduler))
    cap = device_cap_within(decoder, run_spec, int(uniform.cap * total))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, spec.vocab_size, (uniform.batch, uniform.prompt_len), generator=generator).tolist()
    return run_batch(
        decoder, replace(run_spec, config=replace(config, kv_device_memory=cap)), prompts, uniform.output_len
    )
