"""Attention while a prompt is read: dense and causal, and the few rows that seed a selection policy.

No S x S matrix is ever built: attention goes through torch's fused kernel, and only the last rows of the prompt, the
ones that the policy asks for, get explicit weights, in blocks of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MASS_BLOCK_SCORES = 1 << 23
"""Scores held at once while seeding: 32 MiB in float32, small beside the weights of any model and large enough for a
GEMM."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens: q `[T, H, D]`, k and v `[S, G, D]`, T <= S -> `[T, H, D]`."""
    num_new, num_total = q.shape[0], k.shape[0]
    mask = None
    if num_new != num_total and num_new > 1:
        mask = torch.ones(num_new, num_total, dtype=torch.bool, device=q.device).tril_(num_total - num_new)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=num_new == num_total and num_new > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def causal_mass(q: Tensor, k: Tensor, num_sets: int) -> Iterator[tuple[int, Tensor]]:
    """Attention weights of the last W of S tokens, summed over the heads of each index set, in blocks of rows.

    Args:
        q: `[W, H, D]`, the last W queries.
        k: `[S, G, D]`.
        num_sets: J, 1 for one index set per layer or G for one per KV head.

    Yields:
        (first, mass): mass Float32[rows, J, S] of the queries at positions first, first + 1, ...
    """
    num_rows, num_heads, head_dim = q.shape
    num_total, num_kv_heads = k.shape[:2]
    keys = k.float().permute(1, 2, 0)[:, None]  # [G, 1, D, S]
    columns = torch.arange(num_total, device=q.device)
    block = max(1, MASS_BLOCK_SCORES // (num_heads * num_total))
    for start in range(0, num_rows, block):
        rows = q[start : start + block].float() * head_dim**-0.5
        first = num_total - num_rows + start
        grouped = rows.view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
        scores = grouped @ keys  # [G, H/G, rows, S]
        positions = first + torch.arange(rows.shape[0], device=q.device)
        scores = scores.masked_fill(columns > positions[:, None], -torch.inf)
        weights = scores.softmax(dim=-1).sum(dim=1)  # [G, rows, S]
        yield first, weights.transpose(0, 1) if num_sets > 1 else weights.sum(dim=0)[:, None]
