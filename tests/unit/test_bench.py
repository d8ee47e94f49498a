"""The kernel benchmark: its arithmetic, and that all candidates of a case really do the same work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import alisa
from alisa.errors import InputError
from alisa.kernels.native import library
from alisa.lab.bench.case import Candidate, Case, Outcome, Role, Timing, time_case
from alisa.lab.bench.cases import CASES, DEFAULT_CASES, AppendCase, DecodeCase, PolicyCase, ProductCase, SketchCase
from alisa.lab.bench.kernels import make_case, make_kernels, make_record, run_case
from alisa.lab.bench.stamp import checkout_commit, current_stamp

needs_kernels = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


def small(case):
    """The same kind of case, in a size for tests."""
    match case:
        case PolicyCase():
            return replace(case, num_seqs=2, num_tokens=80, num_layers=2)
        case AppendCase():
            return replace(case, num_tokens=5, num_kv_heads=2, head_dim=16)
        case ProductCase():
            return replace(case, num_tokens=3, num_in=80, num_out=96)
    kv_heads = 4 * case.num_kv_heads // case.num_heads
    sets = 1 if case.num_sets == 1 else kv_heads
    return replace(case, num_seqs=2, num_tokens=60, num_heads=4, num_kv_heads=kv_heads, head_dim=16, num_sets=sets)


@needs_kernels
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, DecodeCase)])
def test_candidates_attend_to_the_same_rows(name):
    case = small(CASES[name])
    built = make_case(case, make_kernels(None))
    results = {candidate.label: candidate.call(0) for candidate in built.candidates()}
    attended = results.pop("kernel")
    assert any(label.startswith("dense SDPA") for label in results)
    # Queries and results of bfloat16 are rounded to 8 bits, and outputs are sums of values of size 1.
    tolerance = 1e-5 if case.dtype == "float32" else 4 * 2**-8
    for label, result in results.items():
        out = result.out if label == "torch reference" else result
        if label.startswith("dense") and case.share < 1.0:
            assert out.shape == attended.out.shape
        else:
            torch.testing.assert_close(out.float(), attended.out.float(), rtol=tolerance, atol=tolerance)
    assert built.num_bytes == case.num_seqs * case.num_slots * case.row_format.row_bytes


@needs_kernels
@pytest.mark.parametrize("name", ["select", "sketch", "sketch-2bit", "sketch-per-head"])
def test_kernel_and_twin_choose_alike(name):
    built = make_case(small(CASES[name]), make_kernels(None))
    kernel, reference = (candidate.call(1) for candidate in built.candidates())
    if name == "select":
        assert torch.equal(kernel.positions, reference.positions)
    else:
        torch.testing.assert_close(kernel, reference, rtol=1e-2, atol=1e-4)  # the kernel rounds the query


@needs_kernels
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not isinstance(case, DecodeCase)])
def test_upkeep_runs_against_its_twin(name):
    outcome = run_case(small(CASES[name]), make_kernels(None), runs=2, only_kernel=False)
    rivals = {Role.REFERENCE, Role.PACKED} if isinstance(CASES[name], ProductCase) else {Role.REFERENCE}
    assert {timing.role for timing in outcome.timings.values()} == {Role.READ, Role.KERNEL, *rivals}
    assert outcome.bandwidth_share > 0


def test_the_default_is_one_of_each_kind():
    assert {type(CASES[name]) for name in DEFAULT_CASES} == {type(case) for case in CASES.values()}


def test_cases_count_their_bytes():
    row = 2 * 8 * 128 * 2
    assert CASES["bf16-20-gqa"].num_slots == 411
    assert CASES["bf16-20-gqa"].num_bytes == CASES["bf16-20-per-head"].num_bytes == 16 * 411 * row
    assert CASES["bf16-dense-b1-16k"].num_bytes == 16384 * 4 * row
    assert CASES["append-bf16"].num_bytes == 2 * 1024 * 4 * row
    assert SketchCase(work="scores", num_kv_heads=8).num_bytes == 16 * 2048 * (8 * (64 + 4) + 4)
    assert SketchCase(work="append", bits=2, num_seqs=1).num_bytes == 2048 * 32 * (32 + 4 + 256)


def test_candidates_take_turns():
    calls = []

    def rivals():
        yield Candidate(Role.REFERENCE, "reference", lambda number: calls.append(("reference", number)))

    built = Case(lambda number: calls.append(("kernel", number)), rivals, num_bytes=8, num_calls=2)
    outcome = time_case(built, runs=3)
    first, second = [("kernel", 0), ("kernel", 1), ("reference", 0), ("reference", 1)], [("kernel", 2), ("kernel", 3)]
    assert calls[:6] == first + second
    assert len(calls) == 2 * 2 * (2 + 3)
    assert set(outcome.timings) == {"memory read", "kernel", "reference"}
    assert outcome.read_bytes_per_s > 1e8
    assert 0 <= outcome.others_share <= 1
    assert set(time_case(built, runs=2, only_kernel=True).timings) == {"memory read", "kernel"}


OUTCOME = Outcome(
    num_bytes=2**28,
    read_bytes=2**28,
    others_share=0.0,
    timings={
        "memory read": Timing(Role.READ, 0.1, 0.1, 0.1),
        "kernel": Timing.of(Role.KERNEL, [0.1, 0.2, 0.3, 0.2, 0.9]),
        "dense SDPA bfloat16": Timing(Role.DENSE, 3.0, 3.0, 3.0),
        "dense SDPA float32": Timing(Role.DENSE, 1.0, 1.0, 1.0),
    },
)


def test_ratios_are_against_the_fastest_of_a_kind():
    assert OUTCOME.kernel == Timing(Role.KERNEL, 0.2, 0.2, 0.3)
    assert OUTCOME.fastest(Role.DENSE) == ("dense SDPA float32", Timing(Role.DENSE, 1.0, 1.0, 1.0))
    assert OUTCOME.speedup(Role.DENSE) == 5.0
    assert OUTCOME.speedup(Role.REFERENCE) is None
    assert OUTCOME.bandwidth_share == 0.5


def test_a_record_says_what_was_measured_and_where():
    case = CASES["bf16-20"]
    record = make_record(current_stamp(), "avx2", 5, {"bf16-20": (case, OUTCOME)})
    assert record["stamp"]["torch"] == torch.__version__
    assert record["stamp"]["cpu"]
    [measured] = record["cases"]
    assert measured["shape"]["head_dim"] == 128
    assert measured["speedup"] == {"dense": 5.0, "gather": None, "packed": None, "reference": None}
    assert measured["timings"]["kernel"]["low_s"] == 0.2


def test_the_commit_is_that_of_our_own_checkout_only(tmp_path):
    package = Path(alisa.__file__).parent
    commit = checkout_commit(package)
    if (package.parents[1] / ".git").exists():
        assert commit is not None
        assert set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")
    inside = package.parents[1] / "build"
    assert checkout_commit(tmp_path) is None
    assert checkout_commit(inside) is None


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr(library, "isa_names", lambda: ("portable",))
    if library.available():
        with pytest.raises(InputError, match="cannot run avx512 kernels; there is portable"):
            make_kernels("avx512")
    monkeypatch.setattr(library, "available", lambda: False)
    with pytest.raises(InputError, match="alisa doctor says why"):
        make_kernels(None)
