"""Products with integer weights: every instruction set against whole numbers and against the torch references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.native import library
from alisa.kernels.native import product as cpu_product
from alisa.model.linear_int4 import int4_panels, multiply_int4, unpacked
from alisa.model.linear_int8 import GROUP, int8_panels, multiply_int8, quantise_inputs
from alisa.spec import SPAN

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())

ISAS = cpu_product.model_isa_names()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FORMATS = {"int8": (int8_panels, multiply_int8), "int4": (int4_panels, multiply_int4)}

shapes = st.tuples(st.integers(1, 40), st.integers(1, 3 * GROUP + 5), st.integers(1, 200))
"""Tokens, inputs, outputs: whole panels and groups, and all that is left over."""


def case(num_tokens, num_in, num_out, dtype, name="int8", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_in, generator=generator)
    x[:, ::7] *= 40  # some inputs are far larger than the rest
    panels = FORMATS[name][0](torch.randn(num_out, num_in, generator=generator))
    return x.to(dtype), panels, torch.randn(num_out, generator=generator)


def multiply(isa, x, panels, bias, num_threads=None, dtype=None):
    return cpu_product.CpuProducts(isa, num_threads=num_threads)(x, cpu_product.make_matrix(panels, bias), dtype)


def reference(x, panels, bias):
    return FORMATS[panels.format][1](x, panels, bias).to(x.dtype)


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
    panels = int8_panels(weight.float())
    assert (panels.scales == 1).all()
    # At most 197 * 127^2, which float32 holds exactly.
    assert torch.equal(multiply(isa, x.float(), panels, None, num_threads).long(), x @ weight.T)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_sums_of_4_bits_are_those_of_whole_numbers(isa, shape, seed):
    num_tokens, num_in, num_out = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (num_tokens, num_in), generator=generator)
    x[:, ::GROUP] = 127
    # Both ends of the range in every span: scale 1 and minimum -7.
    weight = torch.randint(-7, 9, (num_out, -(-num_in // SPAN) * SPAN), generator=generator)
    weight[:, ::SPAN], weight[:, 1::SPAN] = -7, 8
    weight = weight[:, :num_in]
    if num_in % SPAN == 1:
        return  # a span of one input has no range
    panels = int4_panels(weight.float())
    assert torch.equal(multiply(isa, x.float(), panels, None).long(), x @ weight.T)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), biased=st.booleans(), seed=st.integers(0, 99))
def test_kernels_and_reference_agree_to_the_bit(isa, name, shape, dtype, biased, seed):
    x, panels, bias = case(*shape, dtype, name, seed)
    offset = bias if biased else None
    got = multiply(isa, x, panels, offset)
    assert got.dtype == dtype
    assert torch.equal(got, reference(x, panels, offset))
    unrounded = multiply(isa, x, panels, offset, dtype=torch.float32)
    assert unrounded.dtype == torch.float32
    assert torch.equal(unrounded.to(dtype), got)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tokens", [1, 5, 7, 16, 96, 97, 130, 200])
def test_a_token_does_not_depend_on_its_company(isa, name, num_tokens):
    x, panels, bias = case(num_tokens, 200, 130, torch.bfloat16, name)
    alone = torch.cat([multiply(isa, row[None], panels, bias) for row in x])
    assert torch.equal(multiply(isa, x, panels, bias), alone)
    assert torch.equal(alone, reference(x, panels, bias))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_zeros_and_tiny_groups_are_zero_and_nan_shows(isa, name):
    x, panels, bias = case(4, 2 * GROUP, 70, torch.float32, name)
    x[0] = 0
    x[1] = 1e-38
    x[2, 3] = float("nan")
    x[3, GROUP + 1] = float("inf")
    got = multiply(isa, x, panels, bias)
    assert torch.equal(got[:2], bias.expand(2, -1))
    assert got[2].isnan().all()
    assert not got[3].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_with_strides_are_those_of_a_copy(isa):
    panels = int8_panels(torch.randn(70, 130))
    wide = torch.randn(5, 300)
    for x in (wide[:, 20:150], wide[:, ::2][:, :130]):
        assert torch.equal(multiply(isa, x, panels, None), multiply(isa, x.contiguous(), panels, None))


@pytest.mark.parametrize("isa", ISAS)
def test_no_tokens_no_outputs(isa):
    x, panels, bias = case(3, 20, 30, torch.float32)
    assert multiply(isa, x[:0], panels, bias).shape == (0, 30)


def test_inputs_are_rounded_to_half_a_step():
    x, *_ = case(5, 150, 1, torch.float32)
    codes, steps = quantise_inputs(x)
    assert codes.abs().max() == 127
    back = (codes * steps.unsqueeze(2)).flatten(1)[:, :150]
    assert ((back - x).abs() <= steps.repeat_interleave(GROUP, 1)[:, :150] * 0.5001).all()


@pytest.mark.parametrize("shape", [(1, 2), (64, 64), (70, 130), (1030, 33)], ids=str)
def test_a_weight_of_4_bits_moves_by_half_a_step_or_less_in_all(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    panels = int4_panels(weight)
    spans = -(-shape[1] // SPAN)
    padded = torch.nn.functional.pad(weight, (0, spans * SPAN - shape[1])).view(shape[0], spans, SPAN)
    ranges = panels.ranges.float().permute(0, 3, 1, 2).flatten(0, 1)[: shape[0]]
    back = ranges[:, :, 1:] + ranges[:, :, :1] * unpacked(panels).view(shape[0], spans, SPAN)
    step = (padded.amax(2) - padded.amin(2)) / 15
    # The range that is taken is the best of several, of which one has half a step of error at most (and float16's).
    assert ((back - padded).square().mean(2) <= (0.51 * step + 1e-3).square()).all()


def test_arguments_that_do_not_fit_are_refused():
    x, panels, bias = case(2, 64, 70, torch.float32)
    with pytest.raises(ValueError, match="scales"):
        multiply(None, x, panels._replace(scales=panels.scales[:64]), bias)
    with pytest.raises(ValueError, match="no scales"):
        multiply(None, x, panels._replace(scales=None), bias)
    with pytest.raises(ValueError, match="bias"):
        multiply(None, x, panels, bias[:3])
    with pytest.raises(ValueError, match="codes"):
        multiply(None, x, panels._replace(codes=panels.codes.to(torch.int8)), bias)
    with pytest.raises(ValueError, match="2 parts"):
        multiply(None, x, panels._replace(num_out=65, parts=2), None)
    with pytest.raises(ValueError, match="64 inputs"):
        multiply(None, x[:, :60], panels, bias)
    with pytest.raises(ValueError, match="cannot run here"):
        cpu_product.CpuProducts("avx1024")
