"""The older tokens with the largest scores, in order, without a sort.

torch has no selection that keeps the tie rule: topk leaves open which of two equals it takes, and a stable sort orders
everything (half a dozen launches and several passes over memory). Here one program for each row finds the k-th largest
score bit by bit, from the top: 32 or 64 counts of a row that stays in registers (one tile) or in the caches. Then it
writes the positions above it, and of those equal to it the first ones. The number of tokens comes from the device;
nothing waits for the host. One program reads a row of 131,072 float32 scores 33 times: about 0.1 ms, estimated, not
measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch
from alisa.kernels.triton.settings import power_of_two


@triton.jit
def load_keys(
    scores_ptr: tl.tensor,
    positions: tl.tensor,
    end: tl.tensor,
    SIGNED: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
):
    """Unsigned integers in the order of the scores, -0 equal to 0; those after the end mean nothing."""
    scores = tl.load(scores_ptr + positions, mask=positions < end, other=0.0)
    bits = tl.where(scores == 0.0, 0.0, scores).to(SIGNED, bitcast=True)
    # Negative floats fall where their bits rise: all but the sign are turned over. Then the sign, for unsigned order.
    bits = bits ^ ((bits >> (BITS - 1)) & (2 ** (BITS - 1) - 1))
    return bits.to(KEY, bitcast=True) ^ (tl.full(bits.shape, 1, KEY) << (BITS - 1))


@triton.jit(do_not_specialize=["num_slots"])
def select_top(
    scores_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    older_ends_ptr: tl.tensor,
    older_counts_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    num_slots: tl.tensor,
    SIGNED: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Positions of one row, ascending: the best of the older tokens, then all others. Grid (N,)."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += tl.load(starts_ptr + row)
    positions_ptr += row * num_slots
    end, wanted = tl.load(older_ends_ptr + row), tl.load(older_counts_ptr + row)
    lanes = tl.arange(0, BLOCK)

    # The largest threshold that at least `wanted` scores reach.
    threshold = tl.full([1], 0, KEY)
    bit = tl.full([1], 1, KEY) << (BITS - 1)
    for _ in range(BITS):
        candidate = threshold | bit
        reached = tl.zeros([BLOCK], tl.int32)
        for first in range(0, end, BLOCK):
            positions = first + lanes
            keys = load_keys(scores_ptr, positions, end, SIGNED, KEY, BITS)
            reached += ((keys >= candidate) & (positions < end)).to(tl.int32)
        threshold = tl.where(tl.sum(reached) >= wanted, candidate, threshold)
        bit = bit >> 1

    above = tl.zeros([BLOCK], tl.int32)
    for first in range(0, end, BLOCK):
        positions = first + lanes
        keys = load_keys(scores_ptr, positions, end, SIGNED, KEY, BITS)
        above += ((keys > threshold) & (positions < end)).to(tl.int32)
    num_ties = wanted - tl.sum(above)

    written = 0
    ties = 0
    for first in range(0, end, BLOCK):
        positions = first + lanes
        keys = load_keys(scores_ptr, positions, end, SIGNED, KEY, BITS)
        inside = positions < end
        tied = (keys == threshold) & inside
        tie_ranks = ties + tl.cumsum(tied.to(tl.int32), axis=0)
        chosen = ((keys > threshold) & inside) | (tied & (tie_ranks <= num_ties))
        places = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(positions_ptr + places, positions, mask=chosen)
        ties += tl.sum(tied.to(tl.int32))
        written += tl.sum(chosen.to(tl.int32))

    count = tl.load(counts_ptr + row)
    # pyrefly: ignore[bad-argument-type]
    for first in range(wanted, num_slots, BLOCK):
        places = first + lanes
        positions = tl.where(places < count, end + places - wanted, 0)
        tl.store(positions_ptr + places, positions, mask=places < num_slots)


def launch_select(
    scores: Tensor,
    starts: Tensor,
    older_ends: Tensor,
    older_counts: Tensor,
    counts: Tensor,
    num_slots: int,
    width: int,
) -> Tensor:
    """Positions Int32[N, num_slots] as `SelectionKernels.select` describes them."""
    positions = torch.empty(len(starts), num_slots, dtype=torch.int32, device=scores.device)
    wide = scores.dtype == torch.float64
    # 16 scores for each of 256 threads: 64 registers at most.
    block = min(4096, max(256, power_of_two(width)))
    launch(select_top, (len(starts),))(
        scores,
        starts,
        older_ends,
        older_counts,
        counts,
        positions,
        num_slots,
        SIGNED=tl.int64 if wide else tl.int32,
        KEY=tl.uint64 if wide else tl.uint32,
        BITS=64 if wide else 32,
        BLOCK=block,
        num_warps=8,
    )
    return positions
