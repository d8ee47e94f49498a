"""Equal random prompts under a share of the memory they need: whole steps to measure, no text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from alisa.cache.codec import make_codec
from alisa.config import EngineConfig, KvDtypeName, PolicyName
from alisa.engine.builder import CacheOptions
from alisa.lab.bench.session import Ran, Setting, run_batch
from alisa.model.decoder import Decoder
from alisa.policy.registry import POLICIES
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.spec import RowFormat


@dataclass(frozen=True, slots=True)
class Trial:
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


def run_trial(trial: Trial, decoder: Decoder, directory: Path, seed: int = 0) -> Ran:
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
    codec = make_codec(RowFormat(trial.kv_dtype, spec.num_kv_heads, spec.head_dim))
    total = trial.batch * trial.num_rows * spec.num_layers * codec.format.row_bytes
    uses_disk = trial.cap < 1 or trial.scheduler is not None
    state = POLICIES[trial.policy].total_state_bytes(spec.attention, trial.sparsity, trial.batch, trial.num_rows + 1)
    config = EngineConfig(
        policy=trial.policy,
        sparsity=trial.sparsity,
        kv_dtype=trial.kv_dtype,
        kv_device_memory=int(trial.cap * total) + state,
        kv_disk_memory=2 * total if uses_disk else 0,
        kv_disk_path=directory,
        max_num_seqs=trial.batch,
    )
    setting = Setting(config, CacheOptions(placement=trial.scheduler))
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, spec.vocab_size, (trial.batch, trial.prompt_len), generator=generator).tolist()
    return run_batch(decoder, setting, prompts, trial.output_len)
