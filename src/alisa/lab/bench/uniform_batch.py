"""Equal random prompts under a share of the memory they need: whole steps to measure, no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.cache.codec import make_codec
from alisa.config import EngineConfig, KvDtypeName, PolicyName
from alisa.engine.builder import CacheOptions
from alisa.lab.bench.session import RunResult, RunSpec, run_batch
from alisa.model.decoder import Decoder
from alisa.policy.registry import POLICIES
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.spec import RowFormat


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
    """Of the bytes that all rows take, the share that the device may hold; below 1 the rest goes to disk."""
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
    codec = make_codec(RowFormat(uniform.kv_dtype, spec.num_kv_heads, spec.head_dim))
    total = uniform.batch * uniform.num_rows * spec.num_layers * codec.format.row_bytes
    uses_disk = uniform.cap < 1 or uniform.scheduler is not None
    state = POLICIES[uniform.policy].total_state_bytes(
        spec.attention, uniform.sparsity, uniform.batch, uniform.num_rows + 1
    )
    config = EngineConfig(
        policy=uniform.policy,
        sparsity=uniform.sparsity,
        kv_dtype=uniform.kv_dtype,
        kv_device_memory=int(uniform.cap * total) + state,
        kv_disk_memory=2 * total if uses_disk else 0,
        kv_disk_path=directory,
        max_num_seqs=uniform.batch,
    )
    run_spec = RunSpec(config, CacheOptions(placement=uniform.scheduler))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, spec.vocab_size, (uniform.batch, uniform.prompt_len), generator=generator).tolist()
    return run_batch(decoder, run_spec, prompts, uniform.output_len)
