"""Experiments as files: which workloads, and which engines do them. No torch.

name = "paper"
rounds = 3                      # each measurement is repeated this many times, in turns

[defaults]                      # for every workload
model = "opt-1.3b"              # a shape (weights are random), or the directory or GGUF file of a model
prompt_len = 128
output_len = 512

[[workload]]
name = "b16"
batch = 16

[[run]]
name = "alisa swa"
engine = "alisa"                # or one of `alisa.lab.bench.engines.PEERS`; all other fields are options of the engine
policy = "swa"
sparsity = 0.8
workloads = ["b16"]             # default: all
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alisa.errors import InputError
from alisa.lab.bench.engines import check_options
from alisa.records.structure import structure


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts that arrive together, each continued by exactly `output_len` tokens."""

    name: str
    model: str
    """A shape (`alisa.lab.bench.shapes`), whose weights are random, or the directory or GGUF file of a model, in which
    `~` and environment variables are replaced."""
    batch: int
    """Most sequences that are worked on together."""
    output_len: int
    prompt_len: int | None = None
    """Of every prompt, which are then `batch` prompts of random ids; in a conversation what is new in each turn."""
    prompts: str | None = None
    """File of prompts instead, as `alisa generate --input` reads it; environment variables in it are replaced."""
    num_prompts: int | None = None
    """How many of the file, from its beginning; None: as many as the batch."""
    dtype: str = "bfloat16"
    seed: int = 0
    kv_share: float | None = None
    """Cap of the memory for K and V, as a share of what they take in `dtype`; None: none."""
    turns: int | None = None
    """The prompts are the turns of one conversation, each asked when the one before it is answered; None: of none."""
    timeout_s: int = 3600
    """After this a run is given up."""

    def __post_init__(self) -> None:
        if (self.prompt_len is None) == (self.prompts is None):
            raise InputError(f"workload {self.name!r} needs either prompt_len or prompts.")
        for name in ("batch", "output_len", "prompt_len", "num_prompts", "kv_share", "turns"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"workload {self.name!r}: {name} is {value}, it must be above 0.")
        if self.turns is not None and (self.batch != 1 or self.prompt_len is None or self.kv_share is not None):
            raise InputError(f"workload {self.name!r} has turns: it needs batch = 1 and prompt_len, and no kv_share.")

    @property
    def what(self) -> dict[str, Any]:
        """All that decides the work, without its name."""
        values = {key: value for key, value in asdict(self).items() if key not in ("name", "timeout_s")}
        # Said where there are some, so that what was measured before there were keeps its cell.
        return values if self.turns is not None else {key: value for key, value in values.items() if key != "turns"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """An engine and its options."""

    name: str
    engine: str
    options: Mapping[str, Any]
    workloads: tuple[str, ...]
    """Names of those that it does."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One engine doing one workload once."""

    experiment: str
    workload: Workload
    run: Run
    round: int

    @property
    def cell(self) -> str:
        """A digest of all that decides the work: the same measurement has the same, whatever it is called."""
        parts = (self.workload.what, self.run.engine, self.run.options, self.round)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a file describes."""

    name: str
    workloads: tuple[Workload, ...]
    runs: tuple[Run, ...]
    rounds: int

    def measurements(self, only: Sequence[str] = ()) -> tuple[Measurement, ...]:
        """All measurements, engine by engine in each workload, and all of them again in the next round.

        Args:
            only: names of runs or workloads; of each kind that is named, just these.

        Raises:
            InputError: a name is not there.
        """
        runs, workloads = {run.name for run in self.runs}, {workload.name for workload in self.workloads}
        if unknown := [name for name in only if name not in runs | workloads]:
            there = ", ".join(sorted(runs | workloads))
            raise InputError(f"{self.name} has no run and no workload {unknown[0]!r}; there is {there}.")
        return tuple(
            Measurement(experiment=self.name, workload=workload, run=run, round=number)
            for number in range(self.rounds)
            for workload in self.workloads
            for run in self.runs
            if workload.name in run.workloads
            and _wanted(run.name, only, runs)
            and _wanted(workload.name, only, workloads)
        )


def _wanted(name: str, only: Sequence[str], kind: set[str]) -> bool:
    return name in only or kind.isdisjoint(only)


def load_experiment(path: Path) -> Experiment:
    """The experiment that a file describes.

    Raises:
        InputError: the file is missing, no TOML, or describes something else.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}.") from error
    try:
        return experiment_from(values)
    except InputError as error:
        reason = str(error).removesuffix(".")
        raise InputError(f"{path}: {reason}; src/alisa/lab/bench/experiment.py shows what belongs there.") from error


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """An experiment as its file has it."""

    name: str
    rounds: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    workload: tuple[Mapping[str, Any], ...]
    run: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class _RunTable:
    """What all runs have, whatever the options of their engine are."""

    name: str
    engine: str
    workloads: tuple[str, ...] | None = None


def experiment_from(values: Mapping[str, Any]) -> Experiment:
    """The experiment of these values, checked.

    Raises:
        InputError: something is missing, unknown, or of another type.
    """
    tables = structure(_Tables, values)
    workloads = tuple(
        structure(Workload, {**tables.defaults, **table}, f"workload[{number}]")
        for number, table in enumerate(tables.workload)
    )
    there = tuple(workload.name for workload in workloads)
    runs = tuple(_run(table, f"run[{number}]", there) for number, table in enumerate(tables.run))
    for names in (there, [run.name for run in runs]):
        if len(set(names)) != len(names):
            raise InputError("two runs, or two workloads, have the same name")
    if tables.rounds < 1:
        raise InputError(f"rounds is {tables.rounds}, at least 1 is needed")
    return Experiment(name=tables.name, workloads=workloads, runs=runs, rounds=tables.rounds)


def _run(table: Mapping[str, Any], where: str, there: tuple[str, ...]) -> Run:
    """One run; `there` are the workloads it may name."""
    own = ("name", "engine", "workloads")
    values = structure(_RunTable, {name: table[name] for name in own if name in table}, where)
    options = {name: value for name, value in table.items() if name not in own}
    chosen = there if values.workloads is None else values.workloads
    if unknown := sorted(set(chosen) - set(there)):
        raise InputError(f"run {values.name!r} names the workload {unknown[0]!r}, which is not there")
    check_options(values.engine, options)
    return Run(name=values.name, engine=values.engine, options=options, workloads=chosen)
