"""Triton decode attention against the definition and against its torch reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from alisa.kernels.base import Attended
from alisa.kernels.reference.decode import decode_attention
from tests.combinations import each
from tests.kernels.cases import ROW_DTYPES, assert_agrees, make_problem, problems
from tests.kernels.triton_device import moved, on_each_device, triton_kernels


def attend(problem, device):
    q, rows, codec, slots, counts, softcap = problem.args()
    arguments = (moved(tensor, device) for tensor in (q, rows, slots, counts))
    q, rows, slots, counts = arguments
    return Attended(*(result.cpu() for result in triton_kernels()(q, rows, codec, slots, counts, softcap)))


@on_each_device
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(1e-3, 1.0, 5.0), most=2))
def test_any_shape_and_dtype_is_the_definition(device, problem):
    assert_agrees(attend(problem, device), problem)


@on_each_device
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(1e-30, 1e4), most=2))
def test_extreme_values_stay_finite(device, problem):
    attended = attend(problem, device)
    for result in attended:
        assert result.isfinite().all()
    num_heads = problem.q.shape[1]
    torch.testing.assert_close(attended.mass.sum(dim=(1, 2)), torch.full((len(problem.q),), float(num_heads)))
    # An average of values lies between the smallest and the largest of them.
    _, v = problem.codec.decode(problem.rows)
    assert attended.out.abs().max() <= v.float().abs().max() * 1.01 + 1e-30


@on_each_device
@each(2, row_dtype=ROW_DTYPES, per_head=[False, True], group=[1, 3], softcap=[None, 0.5])
def test_it_does_what_the_torch_twin_does(device, row_dtype, per_head, group, softcap):
    assert_is_the_twins(device, row_dtype, group=group, per_head=per_head, head_dim=48, softcap=softcap)


@on_each_device
@each(2, row_dtype=["int4", "k8v4"], head_dim=[128, 192, 256], group=[1, 4], softcap=[None, 0.5])
def test_it_does_so_with_heads_in_several_parts(device, row_dtype, head_dim, group, softcap):
    assert_is_the_twins(device, row_dtype, group=group, per_head=group == 1, head_dim=head_dim, softcap=softcap)


def assert_is_the_twins(device, row_dtype, **options):
    problem = make_problem(row_dtype, num_seqs=2, num_rows=300, **options)
    fast = attend(problem, device)
    problem.slots.clamp_(max=299)  # the reference gathers padding too
    for ours, theirs in zip(fast, decode_attention(*problem.args()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("group", [1, 17])
def test_one_long_sequence_is_split_and_merged(device, group):
    problem = make_problem("int4", num_seqs=1, num_rows=5000, counts=[5000], kv_heads=1, group=group, head_dim=31)
    assert_agrees(attend(problem, device), problem)


@on_each_device
@pytest.mark.parametrize("group", [1, 4])
def test_a_sequence_gets_the_same_bits_in_any_company(device, group):
    """No setting depends on the batch, and every sum has one order."""
    together = make_problem("bfloat16", num_seqs=3, num_rows=700, counts=[700, 300, 129], group=group, head_dim=32)
    attended = attend(together, device)
    for seq, count in enumerate(together.counts.tolist()):
        alone = make_problem("bfloat16", num_rows=700, counts=[700, 300, 129], num_seqs=3, group=group, head_dim=32)
        alone.q, alone.counts = alone.q[seq : seq + 1], alone.counts[seq : seq + 1]
        alone.slots = alone.slots[seq : seq + 1, :, :count].contiguous()
        result = attend(alone, device)
        assert torch.equal(result.out[0], attended.out[seq])
        assert torch.equal(result.mass[0], attended.mass[seq, :, :count])
        assert torch.equal(result.log_sum_exp[0], attended.log_sum_exp[seq])


@on_each_device
def test_the_comparison_notices_a_token_too_few(device):
    problem = make_problem("bfloat16", counts=[20, 30])
    problem.counts -= 1
    attended = attend(problem, device)
    problem.counts += 1
    with pytest.raises(AssertionError):
        assert_agrees(attended, problem)


@on_each_device
def test_views_are_read_where_they_lie(device):
    problem = make_problem("bfloat16", kv_heads=2, group=2, head_dim=16)
    pool = torch.zeros(3, *problem.rows.shape, dtype=torch.uint8)
    pool[1] = problem.rows
    problem.rows = moved(pool, device)[1]
    problem.q = torch.stack((problem.q, problem.q * 2), dim=2).to(device)[:, :, 0]
    attended = attend(problem, device)
    problem.q, problem.rows = problem.q.cpu(), problem.rows.cpu()
    assert_agrees(attended, problem)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_beyond_two_gigabytes_are_reached():
    problem = make_problem("bfloat16", num_rows=200, kv_heads=8, head_dim=128)
    row_bytes = problem.codec.format.row_bytes
    num_rows = (5 << 30) // row_bytes
    pool = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device="cuda")
    pool[-200:] = problem.rows.cuda()
    slots = problem.slots.cuda() + (num_rows - 200)
    attended = triton_kernels()(problem.q.cuda(), pool, problem.codec, slots, problem.counts.cuda())
    assert_agrees(Attended(*(result.cpu() for result in attended)), problem)


def test_arguments_that_do_not_fit_are_refused():
    kernels = triton_kernels()
    q, rows, codec, slots, counts, _ = make_problem("float32").args()
    with pytest.raises(TypeError, match="int32"):
        kernels(q, rows, codec, slots.long(), counts)
    with pytest.raises(ValueError, match="do not fit"):
        kernels(q[:, :3], rows, codec, slots, counts)
    with pytest.raises(ValueError, match="pool"):
        kernels(q, rows[:, :-1], codec, slots, counts)
