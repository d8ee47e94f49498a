"""`alisa bench kernels` without the terminal: cases in, one record out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from alisa.errors import InputError
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.lab.bench.case import Case, Outcome, Role, time_case
from alisa.lab.bench.cases import AppendCase, CaseSpec, DecodeCase, PolicyCase, ProductCase, SketchCase
from alisa.lab.bench.decode import decode_case
from alisa.lab.bench.products import product_case
from alisa.lab.bench.ranking import sketch_case
from alisa.lab.bench.upkeep import append_case, policy_case
from alisa.records.schema import Stamp


def make_kernels(isa: str | None) -> cpu.CpuKernels:
    """The native kernels of one instruction set, by default the fastest.

    Raises:
        InputError: they were not built, or this CPU does not have the instructions.
    """
    if not library.available():
        raise InputError("There are no native kernels to measure here; alisa doctor says why and what to do.")
    if isa is not None and isa not in library.isa_names():
        raise InputError(f"This machine cannot run {isa} kernels; there is {', '.join(library.isa_names())}.")
    return cpu.CpuKernels(isa)


def make_case(case: CaseSpec, kernels: cpu.CpuKernels) -> Case:
    """The case with its data, ready to run."""
    match case:
        case DecodeCase():
            return decode_case(case, kernels)
        case AppendCase():
            return append_case(case, kernels)
        case PolicyCase():
            return policy_case(case, kernels)
        case SketchCase():
            return sketch_case(case, kernels)
        case ProductCase():
            return product_case(case, kernels)


def run_case(case: CaseSpec, kernels: cpu.CpuKernels, *, runs: int, only_kernel: bool) -> Outcome:
    """Measure one case."""
    return time_case(make_case(case, kernels), runs, only_kernel=only_kernel)


_RIVALS = (Role.DENSE, Role.GATHER, Role.PACKED, Role.REFERENCE)


def make_record(stamp: Stamp, isa: str, runs: int, cases: Mapping[str, tuple[CaseSpec, Outcome]]) -> dict[str, object]:
    """Everything about one run as plain JSON values."""
    return {
        "benchmark": "kernels",
        "stamp": asdict(stamp),
        "isa": isa,
        "runs": runs,
        "cases": [
            {
                "case": name,
                "shape": asdict(case),
                "bytes": outcome.num_bytes,
                "others_share": outcome.others_share,
                "read_bytes_per_s": outcome.read_bytes_per_s,
                "kernel_bytes_per_s": outcome.bytes_per_s,
                "bandwidth_share": outcome.bandwidth_share,
                "speedup": {role.value: outcome.speedup(role) for role in _RIVALS},
                "timings": {label: asdict(timing) for label, timing in outcome.timings.items()},
            }
            for name, (case, outcome) in cases.items()
        ],
    }
