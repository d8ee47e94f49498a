"""How large the pieces are that the GPU kernels work in: the one place that chooses, and why.

Nothing here depends on the batch. A piece of work always covers the same tokens of a sequence and results are merged in
the same order, so a sequence gets the same bits whatever company it keeps. For the same reason no kernel is specialised
on a size that depends on the batch (`do_not_specialize`): Triton would lay out sums differently for multiples of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from alisa.spec import RowFormat

TILE = 4096
"""Values of one tile: 32 for each of the 128 threads of a program, so that two tiles and an accumulator of the same
size stay in registers."""


@dataclass(frozen=True, slots=True)
class AttendSettings:
    """Pieces of decode attention: a program reads `split_len` tokens of one KV head, `block` at a time."""

    block: int
    split_len: int
    num_warps: int


def attend_settings(row_format: RowFormat, group: int) -> AttendSettings:
    """Settings for `group` query heads on each KV head, which all read the same rows.

    A split is as short as it can be, because few sequences must fill many multiprocessors (one sequence of 3,200
    selected tokens and 8 KV heads makes 200 programs of 128 tokens). But each split leaves D float32 for each query
    head in a scratch buffer, written once and read once: the split is long enough for that to stay under a tenth of the
    rows it read, up to 512 tokens, beyond which too few programs would be left. (8 query heads on 4-bit rows: 12 %,
    in the L2 cache.)
    """
    partial_bytes = 2 * 4 * group * row_format.head_dim
    token_bytes = sum(row_format.head_bytes)
    split_len = 128
    while split_len < 512 and partial_bytes * 10 > split_len * token_bytes:
        split_len *= 2
    # At least 16 tokens, the least that tl.dot takes; more than 64 would only lengthen the tail of a ragged batch.
    block = min(64, max(16, TILE // power_of_two(row_format.head_dim)))
    return AttendSettings(block, split_len, group_warps(group, row_format.head_dim))


def group_warps(group: int, head_dim: int) -> int:
    """Warps of a program for a group of heads: large ones need more registers than 128 threads have (255 each)."""
    if group > 1 and head_dim > 128:
        return 8
    return 8 if group > 16 else 4


def tile_rows(width: int) -> int:
    """Rows of a tile that is `width` values wide: a power of two, at most 128."""
    return min(128, max(1, TILE // power_of_two(width)))


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`: what shapes of Triton tensors must be."""
    return 1 << (count - 1).bit_length()
