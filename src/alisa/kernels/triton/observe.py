"""Attention mass is added to the sums that rank tokens.

An index set holds no position twice and every row has its own part of the tables, so no two threads meet: a load, a sum
and a store, in any order, give the same bits. torch's `index_add_` would take one launch for each table and an atomic
for each sum, because it must expect collisions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch, num_pieces


@triton.jit(do_not_specialize=["num_slots"])
def add_mass(
    sums_ptr: tl.tensor,
    buckets_ptr: tl.tensor,
    sum_starts_ptr: tl.tensor,
    bucket_starts_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    num_slots: tl.tensor,
    BLOCK: tl.constexpr,
):
    """Some tokens of one row. Grid (blocks, N)."""
    row = tl.program_id(1).to(tl.int64)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = ids < tl.load(counts_ptr + row)
    positions = tl.load(positions_ptr + row * num_slots + ids, mask=live, other=0)
    mass = tl.load(mass_ptr + row * num_slots + ids, mask=live, other=0.0)
    sum_ptrs = sums_ptr + tl.load(sum_starts_ptr + row) + positions
    tl.store(sum_ptrs, tl.load(sum_ptrs, mask=live, other=0.0) + mass.to(tl.float64), mask=live)
    bucket_ptrs = buckets_ptr + tl.load(bucket_starts_ptr + row) + positions
    tl.store(bucket_ptrs, tl.load(bucket_ptrs, mask=live, other=0.0) + mass, mask=live)


def launch_observe(
    sums: Tensor,
    buckets: Tensor,
    sum_starts: Tensor,
    bucket_starts: Tensor,
    positions: Tensor,
    counts: Tensor,
    mass: Tensor,
) -> None:
    """Sums and buckets have grown as `SelectionKernels.observe` describes it."""
    num_rows, num_slots = positions.shape
    block = 256
    launch(add_mass, (num_pieces(num_slots, block), num_rows))(
        sums, buckets, sum_starts, bucket_starts, positions, counts, mass, num_slots, BLOCK=block
    )
