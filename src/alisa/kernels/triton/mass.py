"""Attention weights summed over the heads of an index set, from the scores that attention kept.

A weight is known when the sum over all tokens is, that is after the last split. Reading K again would cost half of the
attention; the scores cost 8 bytes for each query head and token (written once, read once) against 2 D values that the
row holds: 1.6 % for 128 values of 16 bits and a K and V for each head, and mostly in the L2 cache. One exponential for
each score is computed a second time here. Weights relative to a running maximum in place of the scores would save it,
at the price of keeping the maxima too; next to the reads it is nothing (an H100 does 3.6e12 a second and reads 6.5e9
such heads).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.settings import power_of_two


@triton.jit(do_not_specialize=["width"])
def sum_weights(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    width: tl.tensor,
    SET_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mass of some tokens of one index set, 0 after the count. Grid (blocks, J, B)."""
    num_sets = tl.num_programs(1)
    seq_set = tl.program_id(2).to(tl.int64) * num_sets + tl.program_id(1)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = ids < tl.load(counts_ptr + tl.program_id(2))
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, SET_HEADS, HEADS):
        members = first + tl.arange(0, HEADS)
        real = members < SET_HEADS
        heads = seq_set * SET_HEADS + members
        best = tl.load(best_ptr + heads, mask=real, other=0.0)
        inverse = tl.load(inverse_ptr + heads, mask=real, other=0.0)
        mask = real[:, None] & live[None, :]
        scores = tl.load(scores_ptr + heads[:, None] * width + ids[None, :], mask=mask, other=float("-inf"))
        mass += tl.sum(tl.exp2(scores - best[:, None]) * inverse[:, None], axis=0)
    tl.store(mass_ptr + seq_set * width + ids, mass, mask=ids < width)


def launch_mass(scores: Tensor, best: Tensor, inverse: Tensor, counts: Tensor, mass: Tensor) -> None:
    """Mass Float32[B, J, W] holds the weights exp2(score - best) * inverse, summed over the heads of each set.

    Args:
        scores: Float32[B, H, W].
        best: Float32[B, H].
        inverse: Float32[B, H].
        counts: Int32[B]; after them mass is 0 and scores are not read.
        mass: written.
    """
    num_seqs, num_sets, width = mass.shape
    set_heads = scores.shape[1] // num_sets
    block = 128
    launch(sum_weights, (num_pieces(width, block), num_sets, num_seqs))(
        scores,
        best,
        inverse,
        counts,
        mass,
        width,
        SET_HEADS=set_heads,
        HEADS=min(32, power_of_two(set_heads)),
        BLOCK=block,
    )
