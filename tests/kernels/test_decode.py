"""Native decode attention against the definition and against its torch reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.decode import decode_attention
from tests.combinations import each
from tests.kernels.cases import ISAS, ROW_DTYPES, Problem, assert_agrees, kernels, make_problem, problems

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(1e-3, 1.0, 5.0)))
def test_any_shape_and_dtype_is_the_definition(isa, problem):
    assert_agrees(kernels(isa)(*problem.args()), problem)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(1e-30, 1e4)))
def test_extreme_values_stay_finite(isa, problem):
    attended = kernels(isa)(*problem.args())
    for result in attended:
        assert result.isfinite().all()
    num_heads = problem.q.shape[1]
    torch.testing.assert_close(attended.mass.sum(dim=(1, 2)), torch.full((len(problem.q),), float(num_heads)))
    # An average of values lies between the smallest and the largest of them.
    _, v = problem.codec.decode(problem.rows)
    assert attended.out.abs().max() <= v.float().abs().max() * 1.01 + 1e-30


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_it_does_what_the_torch_twin_does(isa, row_dtype, per_head, softcap):
    assert_is_the_twins(isa, row_dtype, kv_heads=4, group=3, per_head=per_head, softcap=softcap)


@pytest.mark.parametrize("row_dtype", ["int4", "k8v4"])
@pytest.mark.parametrize("isa", ISAS)
@each(2, head_dim=[128, 256], group=[1, 4], per_head=[False, True], softcap=[None, 0.5])
def test_it_does_so_with_heads_in_several_parts(isa, row_dtype, head_dim, group, per_head, softcap):
    assert_is_the_twins(isa, row_dtype, head_dim=head_dim, group=group, per_head=per_head, softcap=softcap)


def assert_is_the_twins(isa, row_dtype, **options):
    problem = make_problem(row_dtype, num_seqs=3, num_rows=500, counts=[500, 67, 1], **options)
    problem.slots.clamp_(max=499)  # the reference gathers padding too
    fast, slow = kernels(isa)(*problem.args()), decode_attention(*problem.args())
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_comparison_notices_a_token_too_few():
    problem = make_problem("bfloat16", counts=[20, 30])
    attended = cpu.CpuKernels()(problem.q, problem.rows, problem.codec, problem.slots, problem.counts - 1)
    with pytest.raises(AssertionError):
        assert_agrees(attended, problem)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("share_threads", [True, False])
def test_one_long_sequence_is_split_and_merged(num_threads, share_threads):
    problem = make_problem("float32", num_seqs=1, num_rows=5000, counts=[5000], group=1)
    kernel = cpu.CpuKernels(num_threads=num_threads, share_threads=share_threads)
    assert_agrees(kernel(*problem.args()), problem)


def test_partial_results_of_two_tiers_merge_by_log_sum_exp():
    problem = make_problem("float32", counts=[40, 40])
    kernel = cpu.CpuKernels()
    parts = []
    for span in (slice(0, 15), slice(15, 40)):
        slots = problem.slots[:, :, span].contiguous()
        parts.append(
            kernel(problem.q, problem.rows, problem.codec, slots, torch.full_like(problem.counts, slots.shape[2]))
        )
    total = torch.logaddexp(parts[0].log_sum_exp, parts[1].log_sum_exp)
    merged = sum(part.out * (part.log_sum_exp - total).exp().unsqueeze(-1) for part in parts)
    whole = kernel(*problem.args())
    torch.testing.assert_close(merged, whole.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, whole.log_sum_exp)


def test_calls_after_another_shape_reuse_the_workspace():
    kernel = cpu.CpuKernels()
    for num_rows, seed in ((300, 1), (10, 2), (700, 3)):
        problem = make_problem("int8", num_rows=num_rows, head_dim=37, seed=seed)
        assert_agrees(kernel(*problem.args()), problem)


def test_arguments_that_do_not_fit_are_refused():
    problem = make_problem("float32")
    kernel = cpu.CpuKernels()
    q, rows, codec, slots, counts, _ = problem.args()
    with pytest.raises(TypeError, match="int32"):
        kernel(q, rows, codec, slots.long(), counts)
    with pytest.raises(ValueError, match="do not fit"):
        kernel(q[:, :3], rows, codec, slots, counts)
    with pytest.raises(ValueError, match="pool"):
        kernel(q, rows[:, :-1], codec, slots, counts)
    with pytest.raises(ValueError, match="cannot run here"):
        cpu.CpuKernels("mmx")


def test_slots_are_checked_on_request():
    rows = torch.zeros(4, 8, dtype=torch.uint8)
    counts = torch.tensor([2], dtype=torch.int32)
    cpu.check_slots(rows, torch.tensor([[[3, 0, 9]]], dtype=torch.int32), counts)
    with pytest.raises(ValueError, match="twice"):
        cpu.check_slots(rows, torch.tensor([[[3, 3]]], dtype=torch.int32), counts)
    with pytest.raises(ValueError, match="pool of 4"):
        cpu.check_slots(rows, torch.tensor([[[3, 4]]], dtype=torch.int32), counts)
    with pytest.raises(ValueError, match="between 1 and 1"):
        cpu.check_slots(rows, torch.tensor([[[3]]], dtype=torch.int32), counts)


def test_views_are_read_where_they_lie():
    problem = make_problem("bfloat16", kv_heads=2, group=2, head_dim=16)
    pool = torch.zeros(3, *problem.rows.shape, dtype=torch.uint8)
    pool[1] = problem.rows
    strided_q = torch.stack((problem.q, problem.q * 2), dim=2)[:, :, 0]
    moved = Problem(strided_q, pool[1], problem.codec, problem.slots, problem.counts)
    assert_agrees(cpu.CpuKernels()(*moved.args()), problem)
