"""What a line of a file of results holds, as dataclasses.

`alisa.records.structure.structure_record` makes them of lines. Lines of earlier versions are read too: a field that
came later, or that was not recorded, has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from alisa.records.jsonl import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The circumstances of a benchmark: a record without them cannot be compared with another."""

    date: str
    """UTC, to the second."""
    commit: str | None = None
    """Of the checkout that ran; ends in -dirty when files differed from it. None for an installed package."""
    alisa: str | None = None
    torch: str | None = None
    python: str | None = None
    cpu: str
    cpu_capability: str | None = None
    """What torch makes of the processor."""
    num_cpus: float | None = None
    """That the process may keep busy."""
    num_threads: int
    """That torch uses."""
    spinning: str | None = None
    """How long threads spin that wait for each other."""
    threads_fixed: bool | None = None
    """Whether the user fixed the threads, so that they do not follow the load."""
    memory_bytes: int | None = None
    huge_pages: str | None = None
    """The kernel's setting: `always`, `madvise` or `never`."""
    huge_pages_asked: bool | None = None
    """Whether torch was told to ask for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalStamp:
    """When and with what a cell of an evaluation was measured."""

    date: str
    alisa: str
    torch: str
    python: str
    machine: str
    threads: int
    attention: str
    """Name of the kernels."""
    dtype: str
    """Of the arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One cell of `alisa eval`: a policy at a sparsity, with one row format, on one task."""

    kind: str
    """`ppl`, `qa`, `recall`, `generation` or `sparsity`."""
    cell: str
    """Digest of everything that decides the numbers."""
    model: str
    task: str
    policy: str
    sparsity: float
    coverage: float | None = None
    layers: tuple[float, ...] | None = None
    """The sparsity of each layer without a sliding window, where they differ; `sparsity` is that of all together."""
    kv_dtype: str
    weight_dtype: str | None = None
    metric: str
    value: float
    standard_error: float | None
    """None: there is one unit only."""
    versus_dense: float
    versus_dense_error: float | None
    seconds: float
    kv_token_bytes: int
    policy_token_bytes: float
    details: Mapping[str, Any]
    """Further figures of this kind; in the line they are fields like the others."""
    units: tuple[float, ...] | None = None
    """One number for each window or question; None: the record was shortened."""
    settings: Mapping[str, Any]
    stamp: EvalStamp


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRecord:
    """A workload of an experiment (`alisa.lab.bench.experiment.Workload`), and what its prompts came to."""

    name: str
    model: str
    batch: int
    output_len: int
    prompt_len: int | None = None
    prompts: str | None = None
    num_prompts: int | None = None
    dtype: str
    seed: int
    kv_share: float | None = None
    turns: int | None = None
    timeout_s: int
    num_sequences: int
    prompt_tokens: int
    """Of all prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What a run came to."""

    tokens_per_s: float
    """Output tokens over the whole time."""
    decode_tokens_per_s: float | None
    """After the last first token; None where prompts are read between decode steps."""
    wall_s: float
    first_token_median_s: float | None
    first_token_last_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds below which a workload cannot be done in this way."""

    weights_s: float
    """Of the decode steps, reading the weights."""
    rows_s: float
    """Of the decode steps, reading the rows of K and V."""
    gemm_s: float | None
    """Of the decode steps, the products (which read the weights); None for weights of another format."""
    prefill_s: float
    """Products of the prompts."""
    read_bytes_per_s: float

    @property
    def decode_s(self) -> float:
        """All decode steps."""
        return (self.weights_s if self.gemm_s is None else max(self.gemm_s, self.weights_s)) + self.rows_s

    @property
    def wall_s(self) -> float:
        """Everything."""
        return self.prefill_s + self.decode_s

    def line(self) -> dict[str, float | None]:
        """As a record holds it."""
        return asdict(self) | {"decode_s": self.decode_s, "wall_s": self.wall_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One measurement of `alisa bench run`: an engine that did a workload once, or why it did not."""

    kind: Literal["run"] = "run"
    cell: str
    """Digest of everything that decides the work."""
    experiment: str
    workload: WorkloadRecord
    run: str
    """Name of the engine with its options."""
    engine: str
    options: Mapping[str, Any]
    round: int
    status: Literal["ran", "failed", "missing", "unavailable"]
    stamp: Stamp
    kv_need_bytes: int | None
    """K and V of all sequences that run together, at their ends."""
    kv_budget_bytes: int | None
    """Their cap; None: none."""
    reason: str | None = None
    """Why it did not run."""
    figures: RunFigures | None = None
    """None: it did not run."""
    floor: Floor | None = None
    """None: it was not measured."""
    others_share: float | None = None
    """Share of the processors that other programs took; None: it was not watched."""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the engine counted."""
    step_quartiles_s: tuple[float, ...] | None = None
    num_steps: int | None = None

    def line(self) -> Record:
        """As a file holds it; what only a run that ran has is left out where there is none."""
        values = asdict(self)
        only_ran = ("reason", "figures", "floor", "others_share", "versions", "notes", "details")
        for name in (*only_ran, "step_quartiles_s", "num_steps"):
            if not values[name] and values[name] != 0:
                del values[name]
        return values if self.floor is None else values | {"floor": self.floor.line()}
