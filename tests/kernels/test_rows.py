"""Rows written by the native library are the codec's, bit for bit, and integer rows keep what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.cache import codec as codecs
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.spec import CODE_BITS, RowFormat
from tests.kernels.cases import ISAS, ROW_DTYPES, kernels

needs_kernels = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
SCALES = st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0, 300.0, 6e4])


def make_values(num_tokens, kv_heads, head_dim, dtype, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, num_tokens, kv_heads, head_dim, generator=generator).clamp(-1, 1) * scale + offset
    return values.to(dtype)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80)
@given(
    row_dtype=st.sampled_from(ROW_DTYPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 5, 16, 31, 64, 80, 128, 192, 256]),
    scale=SCALES,
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_append_writes_the_codecs_bytes(isa, row_dtype, dtype, kv_heads, head_dim, scale, offset, seed):
    codec = codecs.make_codec(RowFormat(row_dtype, kv_heads, head_dim))
    if row_dtype == "float16" or dtype == torch.float16:
        scale = min(scale, 300.0)
    k, v = make_values(9, kv_heads, head_dim, dtype, scale, offset, seed)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:9]
    rows = torch.full((20, codec.format.row_bytes), 7, dtype=torch.uint8)
    expected = rows.index_copy(0, slots, codec.encode(k, v))
    kernels(isa).append(rows, codec.format, slots, k, v)
    assert torch.equal(rows, expected)


@needs_kernels
def test_append_takes_tokens_that_are_parts_of_a_wider_tensor():
    codec = codecs.make_codec(RowFormat("int8", 2, 16))
    fused = torch.randn(5, 1, 6, 16)
    k, v = fused[:, 0, 2:4], fused[:, 0, 4:6]
    rows = torch.zeros(5, codec.format.row_bytes, dtype=torch.uint8)
    cpu.CpuKernels().append(rows, codec.format, torch.arange(5), k, v)
    assert torch.equal(rows, codec.encode(k, v))


@settings(max_examples=80)
@given(
    row_dtype=st.sampled_from(["int8", "int4", "k8v4"]),
    head_dim=st.sampled_from([1, 2, 5, 64, 128, 256]),
    scale=SCALES,
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_a_value_moves_by_at_most_half_a_step(row_dtype, head_dim, scale, offset, seed):
    if not hasattr(codecs, "make_codec"):
        pytest.skip("integer codecs are not there yet")
    codec = codecs.make_codec(RowFormat(row_dtype, 2, head_dim))
    k, v = make_values(6, 2, head_dim, torch.float32, scale, offset, seed)
    rows = codec.encode(k, v)
    assert rows.shape == (6, codec.format.row_bytes)
    for values, decoded, bits in zip((k, v), codec.decode(rows), CODE_BITS[row_dtype], strict=True):
        values, decoded = (each.reshape(6, *codec.format.part_shape) for each in (values, decoded))
        reach = values.amax(-1) - values.amin(-1)
        # The minimum moves down by at most one float16 step and the scale up by one; 6e-8 is the smallest float16.
        unit = values.abs().amax(-1) * 2**-10 + 6e-8
        step = (reach + unit) / (2**bits - 1) * (1 + 2**-10) + 6e-8
        bound = step / 2 + values.abs().amax(-1) * 2**-22
        assert ((values - decoded).abs().amax(-1) <= bound).all()


@pytest.mark.parametrize("row_dtype", ["int4", "k8v4"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_part_of_large_values_coarsens_no_other(row_dtype, head_dim):
    codec = codecs.make_codec(RowFormat(row_dtype, 2, head_dim))
    k, v = make_values(6, 2, head_dim, torch.float32, 1.0, 0.0, seed=1)
    expected = codec.decode(codec.encode(k, v))
    large = torch.arange(head_dim) // 64 == 1
    found = codec.decode(codec.encode(*(torch.where(large, 1000 * values, values) for values in (k, v))))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[..., ~large], other[..., ~large])


def test_a_constant_head_survives():
    if not hasattr(codecs, "make_codec"):
        pytest.skip("integer codecs are not there yet")
    codec = codecs.make_codec(RowFormat("int4", 1, 8))
    k = torch.full((1, 1, 8), 0.5)
    decoded, _ = codec.decode(codec.encode(k, k))
    assert torch.equal(decoded, k)
