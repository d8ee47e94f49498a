"""Decode attention in three launches: splits, their merge, and the mass.

Flash decoding (Dao et al., pytorch.org/blog/flash-decoding, 2023) over rows addressed by slot. Deterministic: nothing
is added up in an order that depends on timing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alisa.kernels.base import Attended
from alisa.kernels.triton.attend_group import attend_group
from alisa.kernels.triton.attend_single import attend_single
from alisa.kernels.triton.launch import launch, num_pieces
from alisa.kernels.triton.mass import launch_mass
from alisa.kernels.triton.merge import merge_splits
from alisa.kernels.triton.rows import RowView
from alisa.kernels.triton.settings import attend_settings, power_of_two, tile_rows
from alisa.spec import RowFormat


def launch_decode(q: Tensor, rows: Tensor, row_format: RowFormat, slots: Tensor, counts: Tensor) -> Attended:
    """Queries `[B, H, D]` have attended to `slots` Int32[B, J, K] of rows UInt8[R, row_bytes], as in `DecodeKernel`.

    Scratch: a float32 score for each head and slot, and D + 2 float32 for each head and split.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_sets, num_slots = slots.shape[1:]
    num_kv_heads = row_format.num_kv_heads
    group = num_heads // num_kv_heads
    settings = attend_settings(row_format, group)
    num_splits = num_pieces(num_slots, settings.split_len)
    view = RowView.of(rows, row_format)

    scores = q.new_empty(num_seqs, num_heads, num_slots, dtype=torch.float32)
    outs = q.new_empty(num_seqs, num_heads, num_splits, head_dim, dtype=torch.float32)
    tops, totals = q.new_empty(2, num_seqs, num_heads, num_splits, dtype=torch.float32).unbind()
    log_sum_exp, best, inverse = q.new_empty(3, num_seqs, num_heads, dtype=torch.float32).unbind()
    out = torch.empty_like(q)
    mass = q.new_empty(num_seqs, num_sets, num_slots, dtype=torch.float32)

    kernel = attend_single if group == 1 else attend_group
    launch(kernel, (num_splits, num_kv_heads, num_seqs))(
        q,
        view.values,
        view.pairs,
        slots,
        counts,
        scores,
        outs,
        tops,
        totals,
        view.values.stride(0),
        view.pairs.stride(0),
        num_slots,
        settings.split_len,
        head_dim**-0.5 * math.log2(math.e),
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED=max(16, power_of_two(group)),
        PER_HEAD=num_sets > 1,
        HEAD_DIM=head_dim,
        HEAD_LEN=view.head_len,
        PLANES=view.planes,
        CODED=view.coded,
        WIDTH=max(16, power_of_two(view.head_len)),
        BLOCK=settings.block,
        num_warps=settings.num_warps,
    )
    width = power_of_two(head_dim)
    launch(merge_splits, (num_heads, num_seqs))(
        outs,
        tops,
        totals,
        counts,
        out,
        log_sum_exp,
        best,
        inverse,
        settings.split_len,
        num_splits,
        HEAD_DIM=head_dim,
        WIDTH=width,
        BLOCK=min(32, tile_rows(width)),
    )
    launch_mass(scores, best, inverse, counts, mass)
    return Attended(out, mass, log_sum_exp)
