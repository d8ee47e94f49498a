"""Partial softmaxes of the splits of a sequence become one.

The maximum and the sum stay apart until the end: log(sum) + maximum would lose the sum where scores are large, and the
weights of a head would no longer add up to 1. Splits are read in order by one program: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from alisa.kernels.triton.rows import LOWEST

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_sums(tops_ptr: tl.tensor, totals_ptr: tl.tensor, num_parts: tl.tensor, BLOCK: tl.constexpr):
    """The maximum over parts, and the sum of exponentials relative to it."""
    lanes = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], LOWEST, tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    # pyrefly: ignore[bad-argument-type]
    for first in range(0, num_parts, BLOCK):
        parts = first + lanes
        live = parts < num_parts
        top = tl.load(tops_ptr + parts, mask=live, other=LOWEST)
        total = tl.load(totals_ptr + parts, mask=live, other=0.0)
        new_tops = tl.maximum(tops, top)
        totals = totals * tl.exp2(tops - new_tops) + total * tl.exp2(top - new_tops)
        tops = new_tops
    best = tl.max(tops, axis=0)
    return best, tl.sum(totals * tl.exp2(tops - best))


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    outs_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    log_sum_exp_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    split_len: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Output and log-sum-exp of one head, and what turns its scores into weights. Grid (H, B)."""
    seq = tl.program_id(1).to(tl.int64)
    head = seq * tl.num_programs(0) + tl.program_id(0)
    num_live = tl.cdiv(tl.load(counts_ptr + seq), split_len)
    tops_ptr += head * num_splits
    best, total = merge_sums(tops_ptr, totals_ptr + head * num_splits, num_live, BLOCK)
    tl.store(best_ptr + head, best)
    tl.store(inverse_ptr + head, 1.0 / total)
    tl.store(log_sum_exp_ptr + head, (best + tl.log2(total)) * LN2)

    outs_ptr += head * num_splits * HEAD_DIM
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    out = tl.zeros([WIDTH], tl.float32)
    for first in range(0, num_live, BLOCK):
        splits = first + lanes
        live = splits < num_live
        weights = tl.exp2(tl.load(tops_ptr + splits, mask=live, other=LOWEST) - best)
        mask = live[:, None] & (columns < HEAD_DIM)[None, :]
        parts = tl.load(outs_ptr + splits[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        out += tl.sum(parts * weights[:, None], axis=0)
    out = (out / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * HEAD_DIM + columns, out, mask=columns < HEAD_DIM)
