"""The part that all evaluations share: which variants of a model are run, and how the results are kept and shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tyro.conf import arg

from alisa.cli.files import to_json
from alisa.cli.options import DisplayOptions
from alisa.cli.screen import error_console, loading_bar
from alisa.config import EngineConfig, KvDtypeName, PolicyName
from alisa.errors import InputError
from alisa.quality import QualityName

if TYPE_CHECKING:
    from alisa.lab.eval.measurement import Evaluation
    from alisa.lab.eval.subject import Subject
    from alisa.records.schema import EvalRecord

_DEFAULT = EngineConfig()
_T = TypeVar("_T", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptEngine(EngineConfig):
    """Which model runs, and how much memory it may use; what is swept, or not used by evaluations, is no option."""

    quality: QualityName | None = field(default=None, init=False)
    policy: PolicyName = field(default=_DEFAULT.policy, init=False)
    sparsity: float = field(default=_DEFAULT.sparsity, init=False)
    coverage: float | None = field(default=None, init=False)
    budgets: Path | None = field(default=None, init=False)
    kv_dtype: KvDtypeName = field(default=_DEFAULT.kv_dtype, init=False)
    kv_host_memory: str | int | None = field(default=None, init=False)
    kv_disk_memory: str | int | None = field(default=None, init=False)
    kv_disk_path: Path | None = field(default=None, init=False)
    schedule: Path | None = field(default=None, init=False)
    max_model_len: int | None = field(default=None, init=False)
    max_num_seqs: int = 64


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The variants that the model is run with: every combination of the lists.

    Raises:
        InputError: at construction, when a value is out of range.
    """

    policy: Annotated[str, arg(metavar="NAME[,NAME...]")] = "all"
    """Policies, separated by commas; all: every one there is. dense is always run, for comparison."""
    sparsity: Annotated[str, arg(metavar="SHARE[,SHARE...]")] = "0.5,0.8,0.9"
    """Shares of the earlier tokens that a step does not read."""
    coverage: Annotated[str | None, arg(metavar="SHARE[,SHARE...]", help_behavior_hint="(default: none)")] = None
    """Parts of the weight that sketch policies read, in as few tokens as the sparsity allows at most."""
    budgets: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """A file of `alisa tune`: the policy and the sparsities that it is for are run with it as well as without."""
    kv_dtype: Annotated[str, arg(metavar="NAME[,NAME...]")] = "auto"
    """What K and V are kept in: auto (as the model computes), float32, bfloat16, float16, int8, int4, k8v4."""
    forward: Annotated[Literal["alisa", "hf"], arg(name="engine")] = "alisa"
    """Whose forward pass runs: our decoder's, or that of Hugging Face transformers, for families that we do not have
    (pip install 'alisa[hf]'). Rows, policies and kernels are ours in both."""
    engine: SweptEngine = field(default_factory=SweptEngine)
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Every cell as a JSON line, written when it is finished; cells that are in the file are not measured again."""

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            EngineConfig(sparsity=sparsity)
        for coverage in self.coverages:
            EngineConfig(coverage=coverage)
        _ = self.policies, self.kv_dtypes

    @property
    def policies(self) -> tuple[PolicyName, ...]:
        """The policies asked for."""
        names: tuple[PolicyName, ...] = get_args(PolicyName)
        return names if self.policy == "all" else known_names(self.policy, names, "policy")

    @property
    def kv_dtypes(self) -> tuple[KvDtypeName, ...]:
        """The row formats asked for."""
        names: tuple[KvDtypeName, ...] = get_args(KvDtypeName)
        return known_names(self.kv_dtype, names, "KV dtype")

    @property
    def coverages(self) -> tuple[float | None, ...]:
        """The coverages asked for."""
        return (None,) if self.coverage is None else numbers(self.coverage, "coverages")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities asked for."""
        return numbers(self.sparsity, "sparsities")


def run_sweep(
    name: str,
    options: SweepOptions,
    display: DisplayOptions,
    make_evaluations: Callable[[Subject], Sequence[Evaluation]],
) -> int:
    """Measure every cell that the output file does not hold yet, and print the tables; returns the exit status.

    Raises:
        AlisaError: something the caller can mend; cells finished until then are kept.
    """
    from alisa.lab.eval.measurement import measure_cells
    from alisa.lab.eval.record_file import RecordFile, eval_line
    from alisa.lab.eval.subject import variants, with_budgets
    from alisa.lab.eval.tables import tables

    show = sys.stderr.isatty() and not display.quiet
    with RecordFile(options.output) as file:
        with loading_bar(options.engine.model or "the embedded model", show=show) as progress:
            subject = load_subject(options, progress)
        evaluations = make_evaluations(subject)
        chosen = variants(options.policies, options.sparsities, options.kv_dtypes, options.coverages)
        if options.budgets is not None:
            chosen = with_budgets(chosen, options.budgets, subject.spec)
        records: list[EvalRecord] = []
        with cell_bar(show=show) as bar:
            task = bar.add_task(name, total=len(evaluations) * len(chosen))
            for evaluation in evaluations:
                for record in measure_cells(subject, evaluation, chosen, file):
                    records.append(record)
                    bar.advance(task)
    # A table in a file or a pipe is as wide as it needs to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 250)
    for table in tables(records):
        console.print(table.title, soft_wrap=True)
        console.print(_drawn(table.header, table.rows), "")
    if display.json:
        slim = [eval_line(replace(record, units=None)) for record in records]
        record = {"command": f"eval {name}", "cells": slim, "output": str(options.output) if options.output else None}
        sys.stdout.write(to_json(record) + "\n")
    return 0


def load_subject(options: SweepOptions, progress: Callable[[int, int], None]) -> Subject:
    """The model that the options ask for; the first place where torch is imported."""
    from alisa.lab.eval.subject import Subject
    from alisa.llm import LLM

    if options.forward == "hf":
        try:
            from alisa.hf.decoder import load_transformers
        except ImportError as error:
            raise InputError(f"--engine hf cannot run: {error}") from error
        return Subject.of(LLM(config=options.engine, loaded=load_transformers(options.engine)))
    return Subject.of(LLM(config=options.engine, progress=progress))


def cell_bar(*, show: bool) -> Progress:
    """Cells done, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=error_console(),
        transient=True,
        disable=not show,
    )


def _drawn(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def numbers(text: str, what: str) -> tuple[float, ...]:
    """The numbers in a comma-separated list.

    Raises:
        InputError: one of them is none.
    """
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is no list of {what}; write numbers with commas between them.") from error


def known_names(text: str, names: tuple[_T, ...], what: str) -> tuple[_T, ...]:
    """The names in a comma-separated list.

    Raises:
        InputError: one of them does not exist.
    """
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in names]:
        raise InputError(f"There is no {what} {unknown[0]!r}; there is {', '.join(names)}.")
    return tuple(name for word in words for name in names if name == word)
