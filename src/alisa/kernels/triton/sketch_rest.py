"""What the tokens that are not read add to each head: those of all tokens, without those that are read.

All tokens were added up block by block while their keys were read (sketch_scores.py). Here one program merges the
blocks of a head, reads the sketched values of the few chosen tokens once more and takes them away, in order: the same
bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.base import Sketch
from alisa.kernels.triton.launch import launch
from alisa.kernels.triton.settings import power_of_two
from alisa.kernels.triton.sketch_scores import WeighedTokens


@triton.jit(do_not_specialize=["width", "num_slots", "num_blocks"])
def sum_not_chosen(
    scores_ptr: tl.tensor,
    best_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    ranges_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    width: tl.tensor,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    KEY_BLOCK: tl.constexpr,
    SET_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head. Grid (H, B)."""
    num_heads = tl.num_programs(0)
    seq = tl.program_id(1).to(tl.int64)
    head = seq * num_heads + tl.program_id(0)
    row = seq * (num_heads // SET_HEADS) + tl.program_id(0) // SET_HEADS
    count, length = tl.load(counts_ptr + row), tl.load(lengths_ptr + seq)
    best, inverse = tl.load(best_ptr + head), tl.load(inverse_ptr + head)
    lanes = tl.arange(0, BLOCK)
    planes = tl.arange(0, 8 // BITS)
    columns = tl.arange(0, WIDTH)
    dims = planes[:, None] * CODE_BYTES + columns[None, :]
    real = (columns < CODE_BYTES)[None, :] & (dims < HEAD_DIM)
    rest = tl.zeros([8 // BITS, WIDTH], tl.float32)
    num_live = tl.cdiv(length, KEY_BLOCK)
    for first in range(0, num_live, BLOCK):
        blocks = first + lanes
        live = blocks < num_live
        weights = tl.exp2(tl.load(tops_ptr + head * num_blocks + blocks, mask=live, other=float("-inf")) - best)
        part_ptrs = parts_ptr + ((head * num_blocks + blocks) * HEAD_DIM)[:, None, None] + dims[None, :, :]
        parts = tl.load(part_ptrs, mask=live[:, None, None] & real[None, :, :], other=0.0)
        rest += tl.sum(parts * (weights * inverse)[:, None, None], axis=0)

    num_kv_heads = num_heads // GROUP
    start, kv_head = tl.load(starts_ptr + seq), tl.program_id(0) // GROUP
    for first in range(0, count, BLOCK):
        slots = first + lanes
        live = slots < count
        positions = tl.load(positions_ptr + row * num_slots + slots, mask=live, other=0)
        scores = tl.load(scores_ptr + head * width + positions, mask=live, other=float("-inf"))
        weights = tl.exp2(scores - best) * inverse
        places = (start + positions) * num_kv_heads + kv_head
        step = tl.load(ranges_ptr + places * 2, mask=live, other=0.0).to(tl.float32)
        minimum = tl.load(ranges_ptr + places * 2 + 1, mask=live, other=0.0).to(tl.float32)
        code_ptrs = codes_ptr + places[:, None] * CODE_BYTES + columns[None, :]
        packed = tl.load(code_ptrs, mask=live[:, None] & (columns < CODE_BYTES)[None, :], other=0).to(tl.int32)
        codes = (packed[:, None, :] >> (planes * BITS)[None, :, None]) & (2**BITS - 1)
        factors, shifts = (weights * step)[:, None, None], (weights * minimum)[:, None, None]
        rest -= tl.sum(codes.to(tl.float32) * factors + shifts, axis=0)
    # Rounding must not show where everything is read.
    tl.store(rest_ptr + head * HEAD_DIM + dims, tl.where(count >= length, 0.0, rest), mask=real)


def launch_rest(
    weighed: WeighedTokens, values: Sketch, starts: Tensor, lengths: Tensor, positions: Tensor, counts: Tensor
) -> Tensor:
    """The rest Float32[B, H, D] of tokens of which `counts` Int32[B * J] positions Int32[B * J, K] are read."""
    num_seqs, num_heads, num_blocks, head_dim = weighed.parts.shape
    code_bytes = values.codes.shape[2]
    rest = weighed.parts.new_empty(num_seqs, num_heads, head_dim)
    launch(sum_not_chosen, (num_heads, num_seqs))(
        weighed.scores,
        weighed.best,
        weighed.inverse,
        weighed.tops,
        weighed.parts,
        values.codes,
        values.ranges,
        starts,
        lengths,
        positions,
        counts,
        rest,
        weighed.scores.shape[2],
        positions.shape[1],
        num_blocks,
        KEY_BLOCK=weighed.key_block,
        SET_HEADS=num_heads * num_seqs // len(counts),
        GROUP=num_heads // values.codes.shape[1],
        HEAD_DIM=head_dim,
        CODE_BYTES=code_bytes,
        BITS=values.bits,
        WIDTH=power_of_two(code_bytes),
        BLOCK=32,
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
