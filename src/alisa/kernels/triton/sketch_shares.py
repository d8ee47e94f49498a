"""The part of each head's attention weight that lies on the tokens chosen, from the scores of all of them.

Where the others are to be added up next (sketch_rest.py), the scores of the chosen ones become those of no weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch
from alisa.kernels.triton.sketch_scores import WeighedTokens


@triton.jit(do_not_specialize=["width", "num_slots"])
def sum_chosen(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    width: tl.tensor,
    num_slots: tl.tensor,
    SET_HEADS: tl.constexpr,
    ERASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The share of one head. Grid (H, B)."""
    num_heads = tl.num_programs(0)
    seq = tl.program_id(1).to(tl.int64)
    head = seq * num_heads + tl.program_id(0)
    row = seq * (num_heads // SET_HEADS) + tl.program_id(0) // SET_HEADS
    count = tl.load(counts_ptr + row)
    best = tl.load(best_ptr + head)
    lanes = tl.arange(0, BLOCK)
    weights = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        places = first + lanes
        live = places < count
        positions = tl.load(positions_ptr + row * num_slots + places, mask=live, other=0)
        score_ptrs = scores_ptr + head * width + positions
        scores = tl.load(score_ptrs, mask=live, other=float("-inf"))
        weights += tl.exp2(scores - best)
        if ERASE:
            tl.store(score_ptrs, tl.full([BLOCK], float("-inf"), tl.float32), mask=live)
    share = tl.sum(weights) * tl.load(inverse_ptr + head)
    # Rounding must not show where everything is read.
    tl.store(shares_ptr + head, tl.where(count >= tl.load(lengths_ptr + seq), 1.0, share))


def launch_shares(
    weighed: WeighedTokens, positions: Tensor, counts: Tensor, lengths: Tensor, *, erase: bool = False
) -> Tensor:
    """Shares Float32[B, H] of positions Int32[B * J, K]: `counts` Int32[B * J] are real, out of `lengths` Int32[B].

    With `erase` their scores are -inf afterwards.
    """
    num_seqs, num_heads, width = weighed.scores.shape
    shares = torch.empty_like(weighed.best)
    launch(sum_chosen, (num_heads, num_seqs))(
        weighed.scores,
        weighed.best,
        weighed.inverse,
        positions,
        counts,
        lengths,
        shares,
        width,
        positions.shape[1],
        SET_HEADS=num_heads * num_seqs // len(counts),
        ERASE=erase,
        BLOCK=256,
    )
    return shares
