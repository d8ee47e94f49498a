"""The mean of a sequence's values at the weight of what attention did not read: one launch in place of seven."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alisa.kernels.triton.launch import launch
from alisa.kernels.triton.settings import power_of_two


@triton.jit
def blend_head(
    sums_ptr: tl.tensor,
    req_index_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    read_ptr: tl.tensor,
    shares_ptr: tl.tensor,
    out_ptr: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One head. Grid (H, B)."""
    num_heads = tl.num_programs(0)
    seq = tl.program_id(1).to(tl.int64)
    head = seq * num_heads + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    real = columns < HEAD_DIM
    owner = tl.load(req_index_ptr + seq) * (num_heads // GROUP) + tl.program_id(0) // GROUP
    sums = tl.load(sums_ptr + owner * HEAD_DIM + columns, mask=real, other=0.0)
    mean = (sums / tl.load(lengths_ptr + seq)).to(tl.float32)
    share = tl.load(shares_ptr + head)
    read = tl.load(read_ptr + head * HEAD_DIM + columns, mask=real, other=0.0).to(tl.float32)
    out = tl.where(share >= 1.0, read, mean + share * (read - mean))
    # pyrefly: ignore[missing-attribute]
    tl.store(out_ptr + head * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=real)


def launch_blend(sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
    """Output `[B, H, D]` as `SelectionKernels.mean_blend` describes it."""
    num_seqs, num_heads, head_dim = out.shape
    blended = torch.empty_like(out)
    launch(blend_head, (num_heads, num_seqs))(
        sums,
        req_index,
        lengths,
        out,
        shares,
        blended,
        GROUP=num_heads // sums.shape[1],
        HEAD_DIM=head_dim,
        WIDTH=power_of_two(head_dim),
    )
    return blended
