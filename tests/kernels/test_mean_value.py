"""Sums of values and what their mean adds to attention: native and Triton kernels against the torch references."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.selection import ReferenceSelection
from tests.kernels.cases import ISAS, kernels
from tests.kernels.triton_device import on_each_device, triton_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_LANES = 4
REFERENCE = ReferenceSelection()


@st.composite
def problems(draw):
    """Tokens of some lanes in any order, then a step of other ones, with more or less read of each head."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    num_tokens = draw(st.sampled_from([1, 7, 60]))
    num_kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 16, 64, 80]))
    dtype = draw(st.sampled_from(DTYPES))
    # Values as parts of a wider tensor, as a fused projection leaves them.
    values = torch.randn(num_tokens, 2 * num_kv_heads, head_dim, generator=generator).to(dtype)[:, num_kv_heads:]
    owners = torch.randint(0, NUM_LANES, (num_tokens,), generator=generator)
    lanes = torch.randperm(NUM_LANES, generator=generator)[: draw(st.integers(1, NUM_LANES))]
    lengths = torch.randint(1, 100, lanes.shape, generator=generator, dtype=torch.int32)
    out = torch.randn(len(lanes), num_kv_heads * draw(st.sampled_from([1, 3, 4])), head_dim, generator=generator)
    shares = torch.rand(out.shape[:2], generator=generator)
    shares[torch.rand(shares.shape, generator=generator) < 0.2] = 1.0
    return owners, values, lanes, lengths, out.to(dtype), shares


def assert_like_the_twins(add, blend, problem, device="cpu"):
    owners, values, lanes, lengths, out, shares = problem
    sums = torch.randn(NUM_LANES, *values.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = sums.to(device)
    REFERENCE.mean_add(sums, owners, values)
    add(ours, owners.to(device), values.to(device))
    torch.testing.assert_close(ours.cpu(), sums, rtol=1e-14, atol=1e-14)
    blended = blend(ours, *(table.to(device) for table in (lanes, lengths, out, shares))).cpu()
    assert blended.dtype == out.dtype
    # Two roundings of float32 and one of the result.
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(blended, REFERENCE.mean_blend(sums, lanes, lengths, out, shares), rtol=eps, atol=1e-5)
    assert torch.equal(blended[shares == 1.0], out[shares == 1.0])


@pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_native_means_are_the_twins(isa, problem):
    assert_like_the_twins(kernels(isa).mean_add, kernels(isa).mean_blend, problem)


@on_each_device
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_triton_means_are_the_twins(device, problem):
    assert_like_the_twins(triton_kernels().mean_add, triton_kernels().mean_blend, problem, device)


@pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
def test_arguments_that_do_not_fit_are_refused():
    kernel = cpu.CpuKernels()
    sums, lanes, values = torch.zeros(2, 2, 8, dtype=torch.float64), torch.arange(2), torch.zeros(2, 2, 8)
    lengths, shares = torch.ones(2, dtype=torch.int32), torch.ones(2, 2)
    with pytest.raises(ValueError, match="Float64"):
        kernel.mean_add(sums.float(), lanes, values)
    with pytest.raises(ValueError, match="as many req_indices"):
        kernel.mean_add(sums, lanes[:1], values)
    with pytest.raises(TypeError, match="req_indices are int64"):
        kernel.mean_add(sums, lanes.int(), values)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.mean_blend(sums, lanes, lengths, values[:, :1], shares)
    with pytest.raises(TypeError, match="int32"):
        kernel.mean_blend(sums, lanes, lengths.long(), values, shares)
