"""Groups of options that several commands share; each class is one group of `--help`.

Defaults are read from `alisa.config`, so that the command line and the library can never disagree. Nothing here imports
torch: `--help` and every usage error come at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from alisa.config import DeviceName, DtypeName, EngineConfig, KvDtypeName, PolicyName, WeightDtypeName, parse_bytes
from alisa.policy.registry import policies_help

_DEFAULT = EngineConfig()
_POLICY_HELP = (
    f"Which earlier tokens a step reads. {policies_help()} Why sketch: at sparsity 0.8 it loses 0.1 % of perplexity "
    "where swa loses 8 %, and it looks up all facts in 1024 tokens where every choice by history finds a fifth or less "
    "(docs/accuracy.md)."
)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which model, how it attends, and how much memory it may use.

    Raises:
        InputError: at construction, when a value is out of range.
    """

    model: Annotated[
        str | None, arg(metavar="ID_OR_DIR", help_behavior_hint="(default: the small model inside the package)")
    ] = None
    """A directory or a Hugging Face id of a checkpoint."""
    policy: Annotated[PolicyName, arg(help=_POLICY_HELP)] = _DEFAULT.policy
    sparsity: Annotated[float, arg(metavar="SHARE")] = _DEFAULT.sparsity
    """Share of the earlier tokens that a step does not read, 0 up to but not 1; dense ignores it."""
    dtype: DtypeName = _DEFAULT.dtype
    """What the model computes in; auto: what the checkpoint and the device suit."""
    weight_dtype: WeightDtypeName = _DEFAULT.weight_dtype
    """What the linear layers are kept in; auto: the same as --dtype. int8, on a CPU: half the memory and the reading of
    16 bits, every output channel with a scale."""
    kv_dtype: KvDtypeName = _DEFAULT.kv_dtype
    """What K and V are kept in; auto: the same as --dtype, so that dense attention is exact. int8 and int4 keep a
    scale for each token and head: about half or a quarter of the memory of 16 bits; int8 costs 0.03 % of perplexity
    and no recall, int4 4 %."""
    device: DeviceName = _DEFAULT.device
    """auto: the GPU if there is one."""
    kv_device_memory: Annotated[
        str | None, arg(metavar="SIZE", help_behavior_hint="(default: half of what is free)")
    ] = None
    """Hard cap of the memory for K and V, such as 2GiB or 512MiB. What does not fit goes to disk."""
    kv_host_memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="(default: half of what is free)")] = (
        None
    )
    """With a GPU: hard cap of the K and V in main memory that do not fit the GPU; 0: none."""
    kv_disk_memory: Annotated[
        str | None, arg(metavar="SIZE", help_behavior_hint="(default: what the work needs, within the free room)")
    ] = None
    """Hard cap of the K and V on disk; 0: none, prompts wait for room in memory instead."""
    kv_disk_path: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: the directory for temporary files)")
    ] = None
    """Directory whose disk is used. The file is private to the run and gone when it ends, however it ends."""
    schedule: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: as the memory demands)")] = None
    """When tokens move below the device or are deleted to be recomputed, as JSON (docs/scheduling.md)."""
    max_batch: Annotated[int, arg(metavar="N")] = _DEFAULT.max_batch
    """Prompts worked on together at the most."""

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> EngineConfig:
        """These options as the library's own type, checked."""
        memory = None if self.kv_device_memory is None else parse_bytes(self.kv_device_memory)
        return EngineConfig(
            policy=self.policy,
            sparsity=self.sparsity,
            dtype=self.dtype,
            weight_dtype=self.weight_dtype,
            kv_dtype=self.kv_dtype,
            device=self.device,
            kv_device_memory=memory,
            kv_host_memory=None if self.kv_host_memory is None else parse_bytes(self.kv_host_memory, least=0),
            kv_disk_memory=None if self.kv_disk_memory is None else parse_bytes(self.kv_disk_memory, least=0),
            kv_disk_path=self.kv_disk_path,
            schedule=self.schedule,
            max_batch=self.max_batch,
        )


@dataclass(frozen=True, kw_only=True)
class DisplayOptions:
    """What is said, and where."""

    json: bool = False
    """End standard output with one JSON record on one line."""
    quiet: bool = False
    """No progress and no closing report on standard error."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Prompts from a file, results to a file."""

    input: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Prompts: .jsonl with {"prompt"} or {"instruction", "input"} on each line, .json with a list of those, .txt with
    one prompt a line; - reads lines from standard input."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N prompts of --input."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: standard output)")] = None
    """Results as JSON lines, each written when its prompt is finished. The same command goes on where an interrupted
    one ended."""
    report: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """What every step did, as JSON lines: one run record, one record for each step, one summary."""
