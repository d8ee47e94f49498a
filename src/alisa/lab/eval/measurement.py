"""What an evaluation is: a fixed set of units that any variant of the model can be measured on.

A unit is a window of text or a question; units do not depend on each other, so that their spread says how sure a mean
is. All variants are measured on the same units and compared with the baseline unit by unit.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import isnan
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from alisa import __version__
from alisa.errors import InputError
from alisa.lab.eval.record_file import RecordFile
from alisa.lab.eval.statistics import Estimate
from alisa.lab.eval.subject import BASELINE, Subject, Variant
from alisa.policy.registry import POLICIES
from alisa.policy.state_bytes import num_parts
from alisa.records.schema import EvalRecord, EvalStamp
from alisa.spec import CODE_BITS


class UnitResults(NamedTuple):
    """What one variant gave."""

    units: list[float]
    """One number for each unit, in their order."""
    details: dict[str, object]
    """Further figures for the record."""


class Evaluation(Protocol):
    """Units, and how their numbers become one."""

    @property
    def kind(self) -> str:
        """Which table and which drawing its records belong to."""
        ...

    @property
    def task(self) -> str:
        """What is measured on: a text, a task."""
        ...

    @property
    def metric(self) -> str:
        """What the value is."""
        ...

    @property
    def length(self) -> int:
        """Tokens of the longest unit."""
        ...

    @property
    def settings(self) -> Mapping[str, object]:
        """All that decides the numbers, except the model and the variant."""
        ...

    def measure(self, subject: Subject, variant: Variant) -> UnitResults:
        """Run one variant over all units."""
        ...

    def value(self, units: Sequence[float]) -> Estimate:
        """The metric."""
        ...

    def versus(self, units: Sequence[float], baseline: Sequence[float]) -> Estimate:
        """The metric against the baseline's, paired by unit."""
        ...


def fingerprint(value: object) -> str:
    """Twelve hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def measure_cells(
    subject: Subject, evaluation: Evaluation, variants: Sequence[Variant], file: RecordFile
) -> Iterator[EvalRecord]:
    """The record of every variant, from the file or measured now; the baseline is among the variants.

    Raises:
        AlisaError: what the evaluation raises, or the file cannot be written; finished cells are kept.
        InputError: the file's record of the baseline was shortened.
    """
    baseline: Sequence[float] = ()
    for variant in sorted(variants, key=lambda variant: variant != BASELINE):
        cell = _cell(subject, evaluation, variant)
        record = file.get(cell)
        if record is None:
            record = measure_cell(subject, evaluation, variant, cell, baseline)
            file.append(record)
        if not baseline:
            if record.units is None:
                raise InputError(
                    "The output file has the figures of dense attention as a whole only, not by window or question, so "
                    "that nothing can be compared with it; choose another --output."
                )
            baseline = record.units
        yield record


def measure_cell(
    subject: Subject, evaluation: Evaluation, variant: Variant, cell: str, baseline: Sequence[float]
) -> EvalRecord:
    """The record of a variant, measured now.

    Args:
        subject: the model.
        evaluation: what is measured.
        variant: of the model.
        cell: the record's name.
        baseline: what dense attention gave, by unit; empty: this is dense attention.

    Raises:
        AlisaError: what the evaluation raises.
    """
    started = perf_counter()
    measured = evaluation.measure(subject, variant)
    seconds = perf_counter() - started
    units = [round(unit, 6) for unit in measured.units]
    value, versus = evaluation.value(units), evaluation.versus(units, baseline or units)
    return EvalRecord(
        kind=evaluation.kind,
        cell=cell,
        model=subject.name,
        task=evaluation.task,
        policy=variant.policy,
        sparsity=variant.sparsity,
        coverage=variant.coverage,
        layers=variant.layers or None,
        kv_dtype=subject.kv_dtype(variant),
        weight_dtype=subject.weight_dtype,
        metric=evaluation.metric,
        value=round(value.value, 6),
        standard_error=_error(value),
        versus_dense=round(versus.value, 6),
        versus_dense_error=_error(versus),
        seconds=round(seconds, 3),
        kv_token_bytes=subject.row_bytes(variant),
        policy_token_bytes=round(subject.state_bytes(variant, evaluation.length), 1),
        details=measured.details,
        units=tuple(units),
        settings=dict(evaluation.settings),
        stamp=_stamp(subject),
    )


def _cell(subject: Subject, evaluation: Evaluation, variant: Variant) -> str:
    """Digest of everything that decides the numbers of one cell."""
    decoder = subject.scorer.decoder
    dtype = str(decoder.dtype).removeprefix("torch.")
    # Said where it is not the dtype of the arithmetic alone, so that cells measured before there was a choice stay.
    weights = {} if subject.weight_dtype == dtype else {"weight_dtype": subject.weight_dtype}
    edition = POLICIES[variant.policy].edition
    editions = {} if edition == 1 else {"edition": edition}
    # Long heads had one range once.
    parts = num_parts(subject.spec.head_dim) if POLICIES[variant.policy].query_aware else 1
    ranges = {} if parts == 1 else {"parts": parts}
    coverage = {} if variant.coverage is None else {"coverage": variant.coverage}
    layers = {"layers": variant.layers} if variant.layers else {}
    # Rows of 4 bits were in the basis of the model once.
    basis = {"row_basis": 1} if 4 in CODE_BITS.get(subject.kv_dtype(variant), ()) else {}
    # And had one range for each head.
    row_parts = subject.codec(variant).format.num_parts
    of_rows = {} if row_parts == 1 else {"row_parts": row_parts}
    return fingerprint(
        {
            "kind": evaluation.kind,
            "task": evaluation.task,
            "settings": dict(evaluation.settings),
            "model": subject.name,
            "dtype": str(decoder.dtype),
            "device": decoder.device.type,
            "policy": variant.policy,
            "sparsity": variant.sparsity,
            "kv_dtype": subject.kv_dtype(variant),
            **weights,
            **editions,
            **ranges,
            **coverage,
            **layers,
            **basis,
            **of_rows,
        }
    )


def _error(estimate: Estimate) -> float | None:
    """The standard error; None where there is none, because JSON has no NaN."""
    return None if isnan(estimate.standard_error) else round(estimate.standard_error, 6)


def _stamp(subject: Subject) -> EvalStamp:
    """When and with what a cell was measured."""
    return EvalStamp(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        alisa=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        attention=subject.scorer.kernels.name,
        dtype=str(subject.scorer.decoder.dtype).removeprefix("torch."),
    )
