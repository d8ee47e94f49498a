"""Attention while a prompt is read, to chosen blocks of earlier keys: FlashPrefill's rule (arXiv 2603.06199).

64 queries share a choice, which is made by the means of 64 keys each. So where a block begins and whether it is whole
decides what its queries read, and nothing else: not the pieces that a prompt comes in, nor what is read with it.

This is what runs where there is no native kernel, slower than dense attention, and the reference of the one that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.kernels.base import KeyBlock
from alisa.kernels.reference.merge import PartialAttention
from alisa.kernels.reference.prefill import attend_block, attend_in_tiles
from alisa.kernels.reference.sinks import with_sinks
from alisa.kernels.reference.softcap import softcapped

BLOCK = 64
"""Queries that share a choice, and keys of a block."""

LOCAL_BLOCKS = 2
"""Blocks before a query's own that it reads in any case; the first one and its own, too."""


def sparse_prefill_attention(
    q: Tensor,
    own: KeyBlock,
    past: Callable[[], Iterable[KeyBlock]],
    alpha: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `SparsePrefillKernel`; torch's fused attention, over copies of the keys that are chosen."""
    whole = len(q) // BLOCK * BLOCK
    first_block = (own.start + len(own.k) - len(q)) // BLOCK
    means = torch.cat([block_means(block.k, q.dtype) for block in (*past(), own)])
    chosen = choose_blocks(q[:whole], means, first_block, alpha, softcap)
    out, log_sum_exp = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if whole:
        out[:whole], log_sum_exp[:whole] = _attend_chosen(q[:whole], own, past(), chosen, first_block, softcap)
    if whole < len(q):
        out[whole:], log_sum_exp[whole:] = attend_in_tiles(q[whole:], own, past(), None, softcap)
    return out if sinks is None else with_sinks(out, log_sum_exp, sinks)


def block_means(k: Tensor, dtype: torch.dtype) -> Tensor:
    """Means `[N // 64, G, D]`, rounded to `dtype`, of the whole blocks of keys `[N, G, D]`, which are taken as such.

    Halves are added to halves: element by element, so that no library chooses an order.
    """
    sums = k[: len(k) // BLOCK * BLOCK].to(dtype).float().unflatten(0, (-1, BLOCK))
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return (sums[:, 0] / BLOCK).to(dtype)


def choose_blocks(q: Tensor, means: Tensor, first_block: int, alpha: float, softcap: float | None = None) -> Tensor:
    """Which blocks of keys the queries of each block read.

    For each head, the weights of the means of all blocks before its own, relative to a row's largest, are added up over
    its rows; blocks with `alpha` of the largest sum are read. What one head of a KV head reads, all of them do.

    Args:
        q: `[B * 64, H, D]`.
        means: `[M, G, D]` of the blocks from the first of the sequence on; M is at least first_block + B - 1.
        first_block: number of the first block of queries, in the sequence.
        alpha: 0 up to but not 1.
        softcap: of the scores, as in `AttentionShape`.

    Returns:
        Bool[B, G, first_block + B]
    """
    num_blocks, num_kv_heads = len(q) // BLOCK, means.shape[1]
    chosen = torch.zeros(num_blocks, num_kv_heads, first_block + num_blocks, dtype=torch.bool)
    for block in range(num_blocks):
        own, queries = first_block + block, q[block * BLOCK : (block + 1) * BLOCK]
        chosen[block, :, [0, *range(max(own - LOCAL_BLOCKS, 0), own + 1)]] = True
        if own:
            rows = queries.float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3) * q.shape[2] ** -0.5
            scores = rows @ means[:own].float().permute(1, 2, 0)[:, None]  # [G, H/G, 64, blocks]
            if softcap is not None:
                scores = softcapped(scores, softcap)
            totals = (scores - scores.amax(-1, keepdim=True)).exp().sum(2)
            chosen[block, :, :own] |= (totals >= alpha * totals.amax(-1, keepdim=True)).any(1)
    return chosen


class _Part(NamedTuple):
    """The queries of a block that share a KV head."""

    q: Tensor
    own: KeyBlock
    """The keys of the block."""
    kv_head: int
    chosen: Tensor
    """Bool[blocks], of the blocks before its own."""
    merged: PartialAttention


def _attend_chosen(
    q: Tensor, own: KeyBlock, past: Iterable[KeyBlock], chosen: Tensor, first_block: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Out `[T, H, D]` and log-sum-exp Float32[T, H] of whole blocks of queries."""
    num_kv_heads = own.k.shape[1]
    grouped = q.unflatten(1, (num_kv_heads, -1))
    parts: list[list[_Part]] = []
    for block, queries in enumerate(grouped.split(BLOCK)):
        start = (first_block + block) * BLOCK
        mine = slice(start - own.start, start - own.start + BLOCK)
        parts.append([])
        for kv_head in range(num_kv_heads):
            heads, key_head = queries[:, kv_head].contiguous(), slice(kv_head, kv_head + 1)
            keys = KeyBlock(start, own.k[mine, key_head].contiguous(), own.v[mine, key_head].contiguous())
            before = chosen[block, kv_head, : first_block + block]
            parts[-1].append(_Part(heads, keys, kv_head, before, PartialAttention(heads)))
    for block in past:
        for part in (part for row in parts for part in row):
            _add_chosen(part, block, softcap)
    out, log_sum_exp = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:3], dtype=torch.float32)
    for row, place in enumerate(range(0, len(q), BLOCK)):
        for part in parts[row]:
            _add_chosen(part, own, softcap)
            attend_block(part.merged, part.q, part.own, part.own, None, softcap)
            out[place : place + BLOCK, part.kv_head] = part.merged.out.to(q.dtype)
            log_sum_exp[place : place + BLOCK, part.kv_head] = part.merged.log_sum_exp
    return out.flatten(1, 2), log_sum_exp.flatten(1, 2)


def _add_chosen(part: _Part, block: KeyBlock, softcap: float | None) -> None:
    """What the part has chosen of a run of blocks before its own."""
    chosen = part.chosen[block.start // BLOCK :][: len(block.k) // BLOCK].nonzero()[:, 0]
    if len(chosen):
        keys, values = (
            of[:, part.kv_head][: len(of) // BLOCK * BLOCK].unflatten(0, (-1, BLOCK))[chosen].flatten(0, 1)[:, None]
            for of in (block.k, block.v)
        )
        attend_block(part.merged, part.q, part.own, KeyBlock(block.start, keys, values), None, softcap)
