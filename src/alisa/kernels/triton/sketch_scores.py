"""Approximate attention weights of every token from the sketch of its key.

Three launches as in decode attention, without values: scores and partial sums of 128 tokens, their merge, and the sum
over heads. Scores wait in scratch, 4 bytes for each query head and token, because a second read of the codes would cost
more (68 bytes for 128 keys of 4 bits) unless more than 8 query heads share them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.base import Sketch
from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.mass import launch_mass
from alisa.kernels.triton.merge import merge_sums
from alisa.kernels.triton.rows import cap_scores
from alisa.kernels.triton.settings import power_of_two, tile_rows


@triton.jit(do_not_specialize=["score_width"])
def score_keys(
    q_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    score_width: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    PART_DIM: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Scores of a group of heads for some tokens, with their maximum and sum. Grid (blocks, G, B)."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1), NUM_HEADS // GROUP
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + seq)
    if block * BLOCK >= length:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    live = ids < length
    columns = tl.arange(0, WIDTH)
    tokens = tl.load(starts_ptr + seq) + ids
    members = tl.arange(0, PADDED)
    real = members < GROUP
    heads = seq * NUM_HEADS + kv_head * GROUP + members
    scores = tl.zeros([PADDED, BLOCK], tl.float32)
    for part in range(PARTS):
        places = (tokens * num_kv_heads + kv_head) * PARTS + part
        code_ptrs = codes_ptr + places[:, None] * CODE_BYTES + columns[None, :]
        codes = tl.load(code_ptrs, mask=live[:, None] & (columns < CODE_BYTES)[None, :], other=0)
        step = tl.load(ranges_ptr + places * 2, mask=live, other=0.0).to(tl.float32)
        minimum = tl.load(ranges_ptr + places * 2 + 1, mask=live, other=0.0).to(tl.float32)
        products = tl.zeros([PADDED, BLOCK], tl.float32)
        q_sum = tl.zeros([PADDED], tl.float32)
        for plane in tl.static_range(8 // BITS):
            dims = plane * CODE_BYTES + columns
            mask = real[:, None] & ((columns < CODE_BYTES) & (dims < PART_DIM))[None, :]
            q_ptrs = q_ptr + (heads[:, None] * PARTS + part) * PART_DIM + dims[None, :]
            q = tl.load(q_ptrs, mask=mask, other=0.0).to(tl.float32) * scale
            values = ((codes >> (plane * BITS)) & (2**BITS - 1)).to(tl.float32)
            q_sum += tl.sum(q, axis=1)
            if PADDED == 1:
                products += tl.sum(values * q, axis=1)[None, :]
            else:
                products += tl.dot(q, tl.trans(values), input_precision="tf32x3")
        scores += products * step[None, :] + q_sum[:, None] * minimum[None, :]
    if CAPPED:
        scores = cap_scores(scores, softcap)
    tl.store(scores_ptr + heads[:, None] * score_width + ids[None, :], scores, mask=real[:, None] & live[None, :])
    scores = tl.where(live[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    total = tl.sum(tl.exp2(scores - top[:, None]), axis=1)
    tl.store(tops_ptr + heads * num_blocks + block, top, mask=real)
    tl.store(totals_ptr + heads * num_blocks + block, total, mask=real)


@triton.jit(do_not_specialize=["num_blocks"])
def merge_blocks(
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    num_blocks: tl.tensor,
    KEY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What turns the scores of one head into weights. Grid (H, B)."""
    seq = tl.program_id(1).to(tl.int64)
    head = seq * tl.num_programs(0) + tl.program_id(0)
    num_live = tl.cdiv(tl.load(lengths_ptr + seq), KEY_BLOCK)
    best, total = merge_sums(tops_ptr + head * num_blocks, totals_ptr + head * num_blocks, num_live, BLOCK)
    tl.store(best_ptr + head, best)
    tl.store(inverse_ptr + head, 1.0 / total)


class WeighedTokens(NamedTuple):
    """Weights, and what they were computed from: weight = exp2(score - best) * inverse."""

    mass: Tensor
    """Float32[B, num_sets, width]: summed over the heads of each index set, 0 after the length."""
    scores: Tensor
    """Float32[B, H, width]"""
    best: Tensor
    """Float32[B, H]"""
    inverse: Tensor
    """Float32[B, H]"""


def launch_sketch_scores(
    query: Tensor,
    keys: Sketch,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    num_sets: int,
    softcap: float | None = None,
) -> WeighedTokens:
    """Weights of the `lengths` Int32[B] tokens from `starts` Int64[B] on."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, code_bytes = keys.num_kv_heads, keys.codes.shape[2]
    group = num_heads // num_kv_heads
    tile_width = max(16, power_of_two(code_bytes))
    key_block = max(16, tile_rows(tile_width))
    num_blocks = num_pieces(width, key_block)
    scores = query.new_empty(num_seqs, num_heads, width, dtype=torch.float32)
    tops, totals = query.new_empty(2, num_seqs, num_heads, num_blocks, dtype=torch.float32).unbind()
    best, inverse = query.new_empty(2, num_seqs, num_heads, dtype=torch.float32).unbind()
    mass = query.new_empty(num_seqs, num_sets, width, dtype=torch.float32)
    launch(score_keys, (num_blocks, num_kv_heads, num_seqs))(
        query,
        keys.codes,
        keys.ranges,
        starts,
        lengths,
        scores,
        tops,
        totals,
        width,
        head_dim**-0.5 * math.log2(math.e),
        (softcap or 0.0) * math.log2(math.e),
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED=1 if group == 1 else max(16, power_of_two(group)),
        PARTS=keys.parts,
        PART_DIM=head_dim // keys.parts,
        CODE_BYTES=code_bytes,
        BITS=keys.bits,
        WIDTH=tile_width,
        BLOCK=key_block,
        CAPPED=softcap is not None,
    )
    launch(merge_blocks, (num_heads, num_seqs))(
        tops, totals, lengths, best, inverse, num_blocks, KEY_BLOCK=key_block, BLOCK=128
    )
    launch_mass(scores, best, inverse, lengths, mass)
    return WeighedTokens(mass, scores, best, inverse)
