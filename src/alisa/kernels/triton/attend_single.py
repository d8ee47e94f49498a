"""Attention of a query head that has its K and V to itself, over one split of the selected tokens.

A program walks through its split a block of tokens at a time. Each token of a block is a lane with an online softmax of
its own (maximum, sum, weighted values), so no maximum or sum is exchanged between warps inside the loop; the lanes are
merged once, when the split has been read. The products are plain multiply-adds: one query leaves a tensor core nothing
to share, and float32 multiply-adds keep up with memory.

The scaled scores go to scratch: they become the attention mass once the sum over all splits is known (mass.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from alisa.kernels.triton.rows import LOWEST, cap_scores, first_values, high_plane, load_tile, low_plane, within_ranges


@triton.jit(do_not_specialize=["num_slots", "in_pieces"])
def attend_single(
    q_ptr: tl.tensor,
    values_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    outs_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    value_stride: tl.tensor,
    pair_stride: tl.tensor,
    num_slots: tl.tensor,
    in_pieces: tl.tensor,
    split_len: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_LEN: tl.constexpr,
    V_LEN: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_PLANES: tl.constexpr,
    PAIRS_AT: tl.constexpr,
    ONE_RANGE: tl.constexpr,
    PARTS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scores, and for each split its maximum, sum and weighted values; arguments as in attend_group."""
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    start = split * split_len
    stop = tl.load(ends_ptr + seq)
    # A whole selection begins at 0: then `in_pieces` is 0, and what lies at begins_ptr does not matter.
    if start >= stop or start < tl.load(begins_ptr + seq) * in_pieces:
        return
    end = tl.minimum(start + split_len, stop)

    k_columns, v_columns = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    k_first = first_values(k_columns, K_LEN, HEAD_DIM, PARTS)
    v_first = first_values(v_columns, V_LEN, HEAD_DIM, PARTS)
    # The second code of a byte is that of the value so much further.
    K_NEXT: tl.constexpr = K_LEN // PARTS
    V_NEXT: tl.constexpr = V_LEN // PARTS
    q_ptr += (seq * NUM_HEADS + head) * HEAD_DIM
    q_low = tl.load(q_ptr + k_first, mask=k_columns < K_LEN, other=0.0).to(tl.float32) * scale
    q_sum = tl.sum(q_low)
    if K_PLANES == 2:
        q_high = tl.load(q_ptr + K_NEXT + k_first, mask=K_NEXT + k_first < HEAD_DIM, other=0.0)
        q_high = q_high.to(tl.float32) * scale
        q_sum += tl.sum(q_high)

    if PER_HEAD:
        slots_ptr += (seq * NUM_HEADS + head) * num_slots
    else:
        slots_ptr += seq * num_slots
    scores_ptr += (seq * NUM_HEADS + head) * num_slots
    k_place = head * K_LEN
    v_place = NUM_HEADS * K_LEN + head * V_LEN
    pairs_ptr += PAIRS_AT

    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    low = tl.zeros([BLOCK, V_WIDTH], tl.float32)
    if V_PLANES == 2:
        high = tl.zeros([BLOCK, V_WIDTH], tl.float32)
    if ONE_RANGE:
        base = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        ids = first + lanes
        live = ids < end
        slots = tl.load(slots_ptr + ids, mask=live, other=0).to(tl.int64)
        places = slots * value_stride
        k = load_tile(values_ptr, places + k_place, k_columns, live, K_LEN)
        v = load_tile(values_ptr, places + v_place, v_columns, live, V_LEN)
        k_pairs = pairs_ptr + slots * pair_stride + 2 * PARTS * head
        v_pairs = k_pairs + 2 * PARTS * NUM_HEADS

        keys = within_ranges(low_plane(k, K_PLANES), k_pairs, k_columns, live, K_LEN, PARTS)
        scores = tl.sum(keys * q_low[None, :], axis=1)
        if K_PLANES == 2:
            keys = within_ranges(high_plane(k), k_pairs, k_columns, live, K_LEN, PARTS)
            # pyrefly: ignore[unbound-name]
            scores += tl.sum(keys * q_high[None, :], axis=1)
        if ONE_RANGE:
            step = tl.load(k_pairs, mask=live, other=0.0).to(tl.float32)
            minimum = tl.load(k_pairs + 1, mask=live, other=0.0).to(tl.float32)
            scores = scores * step + minimum * q_sum
        if CAPPED:
            scores = cap_scores(scores, softcap)
        tl.store(scores_ptr + ids, scores, mask=live)

        scores = tl.where(live, scores, float("-inf"))
        new_top = tl.maximum(top, scores)
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top)
        top = new_top
        total = total * fade + weights
        if ONE_RANGE:
            step = tl.load(v_pairs, mask=live, other=0.0).to(tl.float32)
            minimum = tl.load(v_pairs + 1, mask=live, other=0.0).to(tl.float32)
            # pyrefly: ignore[unbound-name]
            base = base * fade + weights * minimum
            weights *= step
        values = within_ranges(low_plane(v, V_PLANES), v_pairs, v_columns, live, V_LEN, PARTS)
        low = low * fade[:, None] + weights[:, None] * values
        if V_PLANES == 2:
            values = within_ranges(high_plane(v), v_pairs, v_columns, live, V_LEN, PARTS)
            # pyrefly: ignore[unbound-name]
            high = high * fade[:, None] + weights[:, None] * values

    best = tl.max(top, axis=0)
    fade = tl.exp2(top - best)
    part = (seq * NUM_HEADS + head) * num_splits + split
    tl.store(tops_ptr + part, best)
    tl.store(totals_ptr + part, tl.sum(total * fade))
    out = tl.sum(low * fade[:, None], axis=0)
    if ONE_RANGE:
        # pyrefly: ignore[unbound-name]
        shift = tl.sum(base * fade)
        out += shift
    outs_ptr += part * HEAD_DIM
    tl.store(outs_ptr + v_first, out, mask=v_columns < V_LEN)
    if V_PLANES == 2:
        # pyrefly: ignore[unbound-name]
        out = tl.sum(high * fade[:, None], axis=0)
        if ONE_RANGE:
            # pyrefly: ignore[unbound-name]
            out += shift
        tl.store(outs_ptr + V_NEXT + v_first, out, mask=V_NEXT + v_first < HEAD_DIM)
