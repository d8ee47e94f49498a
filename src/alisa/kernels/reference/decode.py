"""Decode attention over rows addressed by slot, in plain torch.

This is the reference of every native kernel: same arguments, same three results. It gathers the selected rows, which on
a CPU costs more than it saves (a copy of every selected row); kernels read them in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Codec


def decode_attention(q: Tensor, rows: Tensor, codec: Codec, slots: Tensor, counts: Tensor) -> Attended:
    """See `DecodeKernel`; scores and weights are computed in float32 whatever the dtype of q and the rows."""
    num_seqs, num_heads, head_dim = q.shape
    num_sets, num_slots = slots.shape[1:]
    num_kv_heads = codec.format.num_kv_heads
    group = num_heads // num_kv_heads
    k, v = codec.decode(rows.index_select(0, slots.reshape(-1)))
    k = _per_kv_head(k, num_seqs, num_sets, num_slots, num_kv_heads)
    v = _per_kv_head(v, num_seqs, num_sets, num_slots, num_kv_heads)
    # [B, G, H/G, D] x [B, G, D, K] -> [B, G, H/G, K]
    grouped = q.float().view(num_seqs, num_kv_heads, group, head_dim) * head_dim**-0.5
    scores = grouped @ k.transpose(2, 3)
    if num_slots:
        padding = torch.arange(num_slots, device=q.device) >= counts[:, None]
        scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
    log_sum_exp = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores - log_sum_exp)
    out = (weights @ v).view(num_seqs, num_heads, head_dim).to(q.dtype)
    mass = weights.sum(dim=2) if num_sets > 1 else weights.sum(dim=(1, 2)).unsqueeze(1)
    return Attended(out, mass, log_sum_exp.view(num_seqs, num_heads))


def head_scores(q: Tensor, rows: Tensor, codec: Codec, slots: Tensor) -> Tensor:
    """Scaled scores Float32[B, H, K] of every head with the rows at slots Int32[B, 1, K].

    What a policy's mass is made of when a selection comes in pieces: weights need the sum over all of them first.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_slots, num_kv_heads = slots.shape[2], codec.format.num_kv_heads
    k, _ = codec.decode(rows.index_select(0, slots.reshape(-1)))
    k = _per_kv_head(k, num_seqs, 1, num_slots, num_kv_heads)
    grouped = q.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim) * head_dim**-0.5
    return (grouped @ k.transpose(2, 3)).view(num_seqs, num_heads, num_slots)


def _per_kv_head(values: Tensor, num_seqs: int, num_sets: int, num_slots: int, num_kv_heads: int) -> Tensor:
    """Gathered `[B*J*K, G, D]` as float32 `[B, G, K, D]`: with one set per KV head, head g reads its own set only."""
    values = values.view(num_seqs, num_sets, num_slots, num_kv_heads, -1).float()
    if num_sets == 1:
        return values[:, 0].transpose(1, 2)
    return values.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
