"""What the tokens that are not read add to each head: their sketched values at their approximate weights.

The scores of all tokens wait in scratch, and those of the tokens read are -inf by now (sketch_shares.py). One launch
adds up the values of a block of tokens for all heads of a group, so that each code is read once; another adds up the
blocks of a head, in order: the same bits every time. Together with the scoring of the keys this would be one launch
less, but one whose programs want more registers than there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.base import Sketch
from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.settings import group_warps, power_of_two
from alisa.kernels.triton.sketch_scores import WeighedTokens


@triton.jit(do_not_specialize=["width"])
def add_values(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    width: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    PART_DIM: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some tokens for a group of heads. Grid (blocks, G, B)."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1), NUM_HEADS // GROUP
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + seq)
    if block * BLOCK >= length:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    live = ids < length
    members = tl.arange(0, PADDED)
    real = members < GROUP
    heads = seq * NUM_HEADS + kv_head * GROUP + members
    best = tl.load(best_ptr + heads, mask=real, other=0.0)
    inverse = tl.load(inverse_ptr + heads, mask=real, other=0.0)
    score_ptrs = scores_ptr + heads[:, None] * width + ids[None, :]
    scores = tl.load(score_ptrs, mask=real[:, None] & live[None, :], other=float("-inf"))
    weights = tl.exp2(scores - best[:, None]) * inverse[:, None]

    tokens = tl.load(starts_ptr + seq) + ids
    columns = tl.arange(0, WIDTH)
    inside = columns < CODE_BYTES
    for part in range(PARTS):
        places = (tokens * num_kv_heads + kv_head) * PARTS + part
        step = tl.load(ranges_ptr + places * 2, mask=live, other=0.0).to(tl.float32)
        minimum = tl.load(ranges_ptr + places * 2 + 1, mask=live, other=0.0).to(tl.float32)
        code_ptrs = codes_ptr + places[:, None] * CODE_BYTES + columns[None, :]
        codes = tl.load(code_ptrs, mask=live[:, None] & inside[None, :], other=0)
        shift = tl.sum(weights * minimum[None, :], axis=1)
        factors = weights * step[None, :]
        sum_ptrs = sums_ptr + (((heads * num_blocks + block) * PARTS + part) * PART_DIM)[:, None]
        for plane in tl.static_range(8 // BITS):
            dims = plane * CODE_BYTES + columns
            values = ((codes >> (plane * BITS)) & (2**BITS - 1)).to(tl.float32)
            if PADDED == 1:
                added = tl.sum(values * tl.trans(factors), axis=0)[None, :]
            else:
                added = tl.dot(factors, values, input_precision="tf32x3")
            mask = real[:, None] & (inside & (dims < PART_DIM))[None, :]
            tl.store(sum_ptrs + dims[None, :], added + shift[:, None], mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def sum_blocks(
    sums_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    num_blocks: tl.tensor,
    KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The blocks of one head. Grid (H, B)."""
    seq = tl.program_id(1).to(tl.int64)
    head = seq * tl.num_programs(0) + tl.program_id(0)
    num_live = tl.cdiv(tl.load(lengths_ptr + seq), KEY_BLOCK)
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real = columns < HEAD_DIM
    rest = tl.zeros([WIDTH], tl.float32)
    for first in range(0, num_live, BLOCK):
        blocks = first + lanes
        sum_ptrs = sums_ptr + ((head * num_blocks + blocks) * HEAD_DIM)[:, None] + columns[None, :]
        mask = (blocks < num_live)[:, None] & real[None, :]
        rest += tl.sum(tl.load(sum_ptrs, mask=mask, other=0.0), axis=0)
    tl.store(rest_ptr + head * HEAD_DIM + columns, rest, mask=real)


def launch_rest(weighed: WeighedTokens, values: Sketch, starts: Tensor, lengths: Tensor, head_dim: int) -> Tensor:
    """The rest Float32[B, H, D] of the tokens that have a weight left."""
    num_seqs, num_heads, width = weighed.scores.shape
    num_kv_heads, code_bytes = values.num_kv_heads, values.codes.shape[2]
    group = num_heads // num_kv_heads
    tile_width = max(16, power_of_two(code_bytes))
    key_block = min(64, max(16, 2048 // tile_width))
    num_blocks = num_pieces(width, key_block)
    sums = weighed.scores.new_empty(num_seqs, num_heads, num_blocks, head_dim)
    rest = weighed.scores.new_empty(num_seqs, num_heads, head_dim)
    launch(add_values, (num_blocks, num_kv_heads, num_seqs))(
        weighed.scores,
        weighed.best,
        weighed.inverse,
        values.codes,
        values.ranges,
        starts,
        lengths,
        sums,
        width,
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED=1 if group == 1 else max(16, power_of_two(group)),
        PARTS=values.parts,
        PART_DIM=head_dim // values.parts,
        CODE_BYTES=code_bytes,
        BITS=values.bits,
        WIDTH=tile_width,
        BLOCK=key_block,
        num_warps=group_warps(group, head_dim),
    )
    launch(sum_blocks, (num_heads, num_seqs))(
        sums,
        lengths,
        rest,
        num_blocks,
        KEY_BLOCK=key_block,
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim),
        BLOCK=16,
    )
    return rest


@triton.jit
def blend_rest(
    read_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One head: its share of what was read, and the rest. Grid (H, B)."""
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    real = columns < HEAD_DIM
    share = tl.load(shares_ptr + head)
    read = tl.load(read_ptr + head * HEAD_DIM + columns, mask=real, other=0.0).to(tl.float32)
    rest = tl.load(rest_ptr + head * HEAD_DIM + columns, mask=real, other=0.0)
    out = tl.where(share >= 1.0, read, rest + share * read)
    # pyrefly: ignore[missing-attribute]
    tl.store(out_ptr + head * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=real)


def launch_rest_blend(out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
    """Output `[B, H, D]` as `SelectionKernels.rest_blend` describes it."""
    num_seqs, num_heads, head_dim = out.shape
    blended = torch.empty_like(out)
    launch(blend_rest, (num_heads, num_seqs))(
        out, shares, rest, blended, HEAD_DIM=head_dim, WIDTH=power_of_two(head_dim)
    )
    return blended
