"""Products with 8-bit weights: every instruction set against whole numbers and against the torch reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.native import library
from alisa.kernels.native import product as cpu_product
from alisa.model.linear_int8 import GROUP, multiply_int8, quantise_inputs, quantise_weight

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())

ISAS = cpu_product.product_isa_names()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

shapes = st.tuples(st.integers(1, 40), st.integers(1, 3 * GROUP + 5), st.integers(1, 200))
"""Tokens, inputs, outputs: whole panels and groups, and all that is left over."""


def case(num_tokens, num_in, num_out, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_in, generator=generator)
    x[:, ::7] *= 40  # some inputs are far larger than the rest
    weight = torch.randn(num_out, num_in, generator=generator)
    return x.to(dtype), *quantise_weight(weight), torch.randn(num_out, generator=generator)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), num_threads=st.sampled_from([1, 2, 3]))
def test_sums_are_those_of_whole_numbers(isa, shape, seed, num_threads):
    num_tokens, num_in, num_out = shape
    generator = torch.Generator().manual_seed(seed)
    # Every group has a 127, so that its step is 1 and inputs are their own codes; scale 1, so that sums come out bare.
    x = torch.randint(-127, 128, (num_tokens, num_in), generator=generator)
    x[:, ::GROUP] = 127
    weight = torch.randint(-127, 128, (num_out, num_in), generator=generator)
    weight[:, 0] = -127
    codes, scales = quantise_weight(weight.float())
    assert (scales == 1).all()
    product = cpu_product.CpuProducts(isa, num_threads=num_threads)(x.float(), codes, scales, None)
    # At most 197 * 127^2, which float32 holds exactly.
    assert torch.equal(product.long(), x @ weight.T)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), biased=st.booleans(), seed=st.integers(0, 99))
def test_kernels_and_twin_agree_to_the_bit(isa, shape, dtype, biased, seed):
    x, codes, scales, bias = case(*shape, dtype, seed)
    offset = bias if biased else None
    got = cpu_product.CpuProducts(isa)(x, codes, scales, offset)
    assert got.dtype == dtype
    assert torch.equal(got, multiply_int8(x, codes, scales, offset))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tokens", [1, 5, 7, 16, 96, 97, 130, 200])
def test_a_token_does_not_depend_on_its_company(isa, num_tokens):
    x, codes, scales, bias = case(num_tokens, 200, 130, torch.bfloat16)
    multiply = cpu_product.CpuProducts(isa)
    alone = torch.cat([multiply(row[None], codes, scales, bias) for row in x])
    assert torch.equal(multiply(x, codes, scales, bias), alone)
    assert torch.equal(alone, multiply_int8(x, codes, scales, bias))


@pytest.mark.parametrize("isa", ISAS)
def test_zeros_and_tiny_groups_are_zero_and_nan_shows(isa):
    x, codes, scales, bias = case(4, 2 * GROUP, 70, torch.float32)
    x[0] = 0
    x[1] = 1e-38
    x[2, 3] = float("nan")
    x[3, GROUP + 1] = float("inf")
    got = cpu_product.CpuProducts(isa)(x, codes, scales, bias)
    assert torch.equal(got[:2], bias.expand(2, -1))
    assert got[2].isnan().all()
    assert not got[3].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_with_strides_are_those_of_a_copy(isa):
    codes, scales = quantise_weight(torch.randn(70, 130))
    multiply = cpu_product.CpuProducts(isa)
    wide = torch.randn(5, 300)
    for x in (wide[:, 20:150], wide[:, ::2][:, :130]):
        assert torch.equal(multiply(x, codes, scales, None), multiply(x.contiguous(), codes, scales, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_inputs_too_many_for_each_thread_are_rounded_once(isa, num_threads):
    x, codes, scales, bias = case(270, 2000, 70, torch.bfloat16)  # more than kOwnInputs of product.cpp
    got = cpu_product.CpuProducts(isa, num_threads=num_threads)(x, codes, scales, bias)
    assert torch.equal(got, multiply_int8(x, codes, scales, bias))


@pytest.mark.parametrize("isa", ISAS)
def test_no_tokens_no_outputs(isa):
    x, codes, scales, bias = case(3, 20, 30, torch.float32)
    assert cpu_product.CpuProducts(isa)(x[:0], codes, scales, bias).shape == (0, 30)


def test_inputs_are_rounded_to_half_a_step():
    x, *_ = case(5, 150, 1, torch.float32)
    codes, steps = quantise_inputs(x)
    assert codes.abs().max() == 127
    back = (codes * steps.unsqueeze(2)).flatten(1)[:, :150]
    assert ((back - x).abs() <= steps.repeat_interleave(GROUP, 1)[:, :150] * 0.5001).all()


def test_arguments_that_do_not_fit_are_refused():
    x, codes, scales, bias = case(2, 64, 70, torch.float32)
    multiply = cpu_product.CpuProducts()
    with pytest.raises(ValueError, match="panels of 64 x 64 weights"):
        multiply(x, codes, scales[:64], bias)
    with pytest.raises(ValueError, match="bias"):
        multiply(x, codes, scales, bias[:3])
    with pytest.raises(TypeError, match="uint8"):
        multiply(x, codes.to(torch.int8), scales, bias)
    with pytest.raises(ValueError, match="cannot run here"):
        cpu_product.CpuProducts("avx1024")
