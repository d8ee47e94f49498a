"""Attention of the query heads that share one head of K and V, over one split of the selected tokens.

Rows are read once for the whole group. The group is padded to 16 heads, the least that a tensor core takes, and the
products run there in three TF32 terms ("tf32x3"), which keeps the accuracy of float32: values of 16 bits and codes are
exact in TF32, and of float32 values and of the weights the first 21 bits count. Padding wastes arithmetic that memory
would otherwise wait for. With one head to a group it is not worth it (attend_single.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from alisa.kernels.triton.rows import LOWEST, cap_scores, first_values, high_plane, load_tile, low_plane, within_ranges


@triton.jit(do_not_specialize=["num_slots", "in_pieces"])
def attend_group(
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
    """Scores, and for each split between begins and ends its maximum, sum and weighted values.

    Grid (splits, G, B). Scores are in powers of two: q . k / sqrt(D) * log2(e), which is what `scale` holds.
    """
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1), NUM_HEADS // GROUP
    seq = tl.program_id(2).to(tl.int64)
    start = split * split_len
    stop = tl.load(ends_ptr + seq)
    # A whole selection begins at 0: then `in_pieces` is 0, and what lies at begins_ptr does not matter.
    if start >= stop or start < tl.load(begins_ptr + seq) * in_pieces:
        return
    end = tl.minimum(start + split_len, stop)

    members = tl.arange(0, PADDED)
    real = members < GROUP
    heads = seq * NUM_HEADS + kv_head * GROUP + members
    k_columns, v_columns = tl.arange(0, K_WIDTH), tl.arange(0, V_WIDTH)
    k_first = first_values(k_columns, K_LEN, HEAD_DIM, PARTS)
    v_first = first_values(v_columns, V_LEN, HEAD_DIM, PARTS)
    # The second code of a byte is that of the value so much further.
    K_NEXT: tl.constexpr = K_LEN // PARTS
    V_NEXT: tl.constexpr = V_LEN // PARTS
    q_ptrs = q_ptr + heads[:, None] * HEAD_DIM + k_first[None, :]
    q_low = tl.load(q_ptrs, mask=real[:, None] & (k_columns < K_LEN)[None, :], other=0.0).to(tl.float32) * scale
    q_sum = tl.sum(q_low, axis=1)
    if K_PLANES == 2:
        mask = real[:, None] & (K_NEXT + k_first < HEAD_DIM)[None, :]
        q_high = tl.load(q_ptrs + K_NEXT, mask=mask, other=0.0).to(tl.float32) * scale
        q_sum += tl.sum(q_high, axis=1)

    if PER_HEAD:
        slots_ptr += (seq * num_kv_heads + kv_head) * num_slots
    else:
        slots_ptr += seq * num_slots
    k_place = kv_head * K_LEN
    v_place = num_kv_heads * K_LEN + kv_head * V_LEN
    pairs_ptr += PAIRS_AT

    lanes = tl.arange(0, BLOCK)
    top = tl.full([PADDED], LOWEST, tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    low = tl.zeros([PADDED, V_WIDTH], tl.float32)
    if V_PLANES == 2:
        high = tl.zeros([PADDED, V_WIDTH], tl.float32)
    if ONE_RANGE:
        base = tl.zeros([PADDED], tl.float32)
    for first in range(start, end, BLOCK):
        ids = first + lanes
        live = ids < end
        slots = tl.load(slots_ptr + ids, mask=live, other=0).to(tl.int64)
        places = slots * value_stride
        k = load_tile(values_ptr, places + k_place, k_columns, live, K_LEN)
        v = load_tile(values_ptr, places + v_place, v_columns, live, V_LEN)
        k_pairs = pairs_ptr + slots * pair_stride + 2 * PARTS * kv_head
        v_pairs = k_pairs + 2 * PARTS * num_kv_heads

        keys = within_ranges(low_plane(k, K_PLANES), k_pairs, k_columns, live, K_LEN, PARTS)
        scores = tl.dot(q_low, tl.trans(keys), input_precision="tf32x3")
        if K_PLANES == 2:
            keys = within_ranges(high_plane(k), k_pairs, k_columns, live, K_LEN, PARTS)
            # pyrefly: ignore[unbound-name]
            scores += tl.dot(q_high, tl.trans(keys), input_precision="tf32x3")
        if ONE_RANGE:
            step = tl.load(k_pairs, mask=live, other=0.0).to(tl.float32)
            minimum = tl.load(k_pairs + 1, mask=live, other=0.0).to(tl.float32)
            scores = scores * step[None, :] + q_sum[:, None] * minimum[None, :]
        if CAPPED:
            scores = cap_scores(scores, softcap)
        tl.store(scores_ptr + heads[:, None] * num_slots + ids[None, :], scores, mask=real[:, None] & live[None, :])

        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        top = new_top
        total = total * fade + tl.sum(weights, axis=1)
        if ONE_RANGE:
            step = tl.load(v_pairs, mask=live, other=0.0).to(tl.float32)
            minimum = tl.load(v_pairs + 1, mask=live, other=0.0).to(tl.float32)
            # pyrefly: ignore[unbound-name]
            base = base * fade + tl.sum(weights * minimum[None, :], axis=1)
            weights *= step[None, :]
        values = within_ranges(low_plane(v, V_PLANES), v_pairs, v_columns, live, V_LEN, PARTS)
        low = low * fade[:, None] + tl.dot(weights, values, input_precision="tf32x3")
        if V_PLANES == 2:
            values = within_ranges(high_plane(v), v_pairs, v_columns, live, V_LEN, PARTS)
            # pyrefly: ignore[unbound-name]
            high = high * fade[:, None] + tl.dot(weights, values, input_precision="tf32x3")

    splits = heads * num_splits + split
    tl.store(tops_ptr + splits, top, mask=real)
    tl.store(totals_ptr + splits, total, mask=real)
    out_ptrs = outs_ptr + splits[:, None] * HEAD_DIM + v_first[None, :]
    if ONE_RANGE:
        # pyrefly: ignore[unbound-name]
        low += base[:, None]
        if V_PLANES == 2:
            # pyrefly: ignore[unbound-name]
            high += base[:, None]
    tl.store(out_ptrs, low, mask=real[:, None] & (v_columns < V_LEN)[None, :])
    if V_PLANES == 2:
        mask = real[:, None] & (V_NEXT + v_first < HEAD_DIM)[None, :]
        # pyrefly: ignore[unbound-name]
        tl.store(out_ptrs + V_NEXT, high, mask=mask)
