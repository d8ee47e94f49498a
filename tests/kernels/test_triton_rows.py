"""Rows and sketches written by the Triton kernels are those of the torch references, bit for bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.cache import codec as codecs
from alisa.kernels.base import Sketch
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.spec import RowFormat
from tests.kernels.cases import ROW_DTYPES
from tests.kernels.test_rows import SCALES, make_values
from tests.kernels.triton_device import on_each_device, triton_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@on_each_device
@settings(max_examples=40)
@given(
    row_dtype=st.sampled_from(ROW_DTYPES),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.sampled_from([1, 9, 17]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 5, 16, 31, 64, 80, 128, 192, 256]),
    scale=SCALES,
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_append_writes_the_codecs_bytes(device, row_dtype, dtype, num_tokens, kv_heads, head_dim, scale, offset, seed):
    codec = codecs.make_codec(RowFormat(row_dtype, kv_heads, head_dim))
    if row_dtype == "float16" or dtype == torch.float16:
        scale = min(scale, 300.0)
    k, v = make_values(num_tokens, kv_heads, head_dim, dtype, scale, offset, seed)
    if row_dtype == "bfloat16" and device == "cpu":
        # The interpreter cuts bits off where hardware rounds: only values that need no rounding can be compared.
        k, v = k.bfloat16().float(), v.bfloat16().float()
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:num_tokens]
    rows = torch.full((20, codec.format.row_bytes), 7, dtype=torch.uint8)
    expected = rows.index_copy(0, slots, codec.encode(k, v))
    written = rows.to(device, copy=True)
    triton_kernels().append(written, codec.format, slots.to(device), k.to(device), v.to(device))
    assert torch.equal(written.cpu(), expected)


@on_each_device
def test_append_takes_tokens_that_are_parts_of_a_wider_tensor(device):
    codec = codecs.make_codec(RowFormat("int8", 2, 16))
    fused = torch.randn(5, 1, 6, 16).to(device)
    k, v = fused[:, 0, 2:4], fused[:, 0, 4:6]
    rows = torch.zeros(5, codec.format.row_bytes, dtype=torch.uint8, device=device)
    triton_kernels().append(rows, codec.format, torch.arange(5, device=device), k, v)
    assert torch.equal(rows.cpu(), codec.encode(k.cpu(), v.cpu()))


@on_each_device
@settings(max_examples=25)
@given(
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.sampled_from([1, 9, 40]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 3, 5, 16, 31, 64, 80, 128]),
    scale=SCALES,
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_sketches_are_the_twins(device, bits, dtype, num_tokens, kv_heads, head_dim, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_tokens, kv_heads, head_dim, generator=generator).clamp(-1, 1) * scale + offset
    # Beyond float16 where the dtype reaches further.
    keys = (keys.clamp(-65504, 65504) if dtype == torch.float16 else keys * 3).to(dtype)
    ids = torch.randperm(2 * num_tokens, generator=generator)[:num_tokens]
    tables = []
    for append, place in ((triton_kernels().sketch_append, device), (ReferenceSelection().sketch_append, "cpu")):
        codes = torch.full((2 * num_tokens, kv_heads, -(-head_dim * bits // 8)), 7, dtype=torch.uint8, device=place)
        ranges = torch.full((2 * num_tokens, kv_heads, 2), 7, dtype=torch.float16, device=place)
        append(Sketch(codes, ranges, bits), ids.to(place), keys.to(place))
        tables.append((codes.cpu(), ranges.cpu()))
    for ours, theirs in zip(*tables, strict=True):
        assert torch.equal(ours, theirs)
