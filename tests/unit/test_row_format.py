"""What the bytes of a row mean, in numbers."""

import pytest

from alisa.cache.offload.hidden import hidden_format
from alisa.spec import RowFormat


@pytest.mark.parametrize("dtype", ["int4", "k8v4"])
def test_long_heads_in_4_bits_have_a_range_for_each_64_values(dtype):
    parts = {head_dim: RowFormat(dtype, 3, head_dim).num_parts for head_dim in (1, 63, 64, 80, 96, 128, 192, 256)}
    assert parts == {1: 1, 63: 1, 64: 1, 80: 1, 96: 1, 128: 2, 192: 3, 256: 4}
    assert RowFormat(dtype, 3, 256).part_shape == (12, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_other_rows_have_whole_heads(dtype):
    assert RowFormat(dtype, 3, 256).num_parts == 1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "num_bytes"),
    [
        ("bfloat16", 256, 2 * 3 * 256 * 2),
        ("int8", 256, 2 * 3 * 256 + 2 * 3 * 4),
        ("k8v4", 256, 3 * 256 + 3 * 128 + 2 * 3 * 4 * 4),
        ("int4", 256, 2 * 3 * 128 + 2 * 3 * 4 * 4),
        ("int4", 64, 2 * 3 * 32 + 2 * 3 * 4),
        ("k8v4", 5, 3 * 5 + 3 * 3 + 2 * 3 * 4),
        ("k8v4", 1, 3 + 3 + 2 * 3 * 4),
    ],
)
def test_a_row_has_its_codes_and_a_pair_for_each_part(dtype, head_dim, num_bytes):
    assert RowFormat(dtype, 3, head_dim).row_bytes == num_bytes


@pytest.mark.parametrize("hidden_size", [576, 640, 2048])
def test_hidden_states_are_in_parts_as_they_are(hidden_size):
    assert hidden_format("int4", hidden_size).num_parts == 1
