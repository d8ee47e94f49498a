"""Attention while a prompt is read: dense and causal, and the few rows that a selection policy observes.

No S x S matrix is ever built: attention goes through torch's fused kernel, and only the last rows of the prompt, the
ones that the policy asks for, get explicit weights, in blocks of bounded size. The later pieces of a long prompt attend
to what is cached block by block, so that a prompt may be larger than any memory that its rows pass through.

This is what runs where there is no native kernel (`engine/prefill.py`), and the reference of the one that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from alisa.kernels.base import KeyBlock, ObservedMass
from alisa.kernels.reference.merge import PartialAttention
from alisa.kernels.reference.sinks import with_sinks
from alisa.kernels.reference.softcap import softcapped

MASS_BLOCK_SCORES = 1 << 23
"""Scores held at once: 32 MiB in float32, small next to the weights of any model and large enough for a GEMM."""

FIRST_TILE_TOKENS, TILE_TOKENS = 128, 256
"""The first tile of a section, and the largest; in between each is as long as all before it."""

TILE_ROWS = 16
"""Queries that torch's attention is given are a multiple of this: as many float32 as a cache line holds."""


def prefill_attention(
    q: Tensor,
    own: KeyBlock,
    section_len: int,
    past: Callable[[], Iterable[KeyBlock]],
    num_observed: int,
    num_sets: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Iterator[ObservedMass]]:
    """See `PrefillKernel`; torch's fused attention, and weights in float32.

    The matrix library sums in another order for another number of rows or keys. So what is shown to a policy goes as
    the whole section, with zeros for what was there before and what is still to come: rows do not mix. On a CPU the
    attention goes in tiles, see `attend_in_tiles`.
    """
    num_seen, later = len(own.k), section_len - len(own.k)
    earlier = num_seen - len(q)
    whole = KeyBlock(own.start, pad(own.k, (0, 0, 0, 0, 0, later)), pad(own.v, (0, 0, 0, 0, 0, later)))
    if q.device.type == "cpu":
        out, log_sum_exp = attend_in_tiles(q, own, past(), window, softcap)
    else:
        queries = pad(q, (0, 0, 0, 0, earlier, later))
        mine, last = slice(earlier, num_seen), slice(num_seen - num_observed, num_seen)
        if not own.start and softcap is None and sinks is None and (window is None or window >= section_len):
            rows = causal_mass(queries[last], whole.k, last.start, num_sets) if num_observed else ()
            out = causal_attention(queries, whole.k, whole.v)
            return out[mine], (ObservedMass(first, 0, mass[..., :num_seen]) for first, mass in rows)
        out, log_sum_exp = (values[mine] for values in attend_after(queries, whole, past(), window, softcap))
    if sinks is not None:
        out = with_sinks(out, log_sum_exp, sinks)
    if not num_observed:
        return out, iter(())
    last, first = slice(len(q) - num_observed, None), own.start + num_seen - num_observed
    observed = mass_after(q[last], log_sum_exp[last], first, chain(past(), (whole,)), num_sets, softcap)
    return out, (one._replace(mass=one.mass[..., : own.start + num_seen - one.start]) for one in observed)


class _Tile(NamedTuple):
    """Tokens of a section between two fixed places, the ones that are not asked for as zeros."""

    own: KeyBlock
    q: Tensor
    merged: PartialAttention
    mine: slice
    """Its tokens that are asked for, among all of these,"""
    rows: slice
    """and among its own."""


def attend_in_tiles(
    q: Tensor, own: KeyBlock, past: Iterable[KeyBlock], window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """What `attend_after` gives the last tokens of a section, in tiles that begin and end at fixed places of it.

    A token gets the same bits whatever pieces its section comes in, and whatever comes after it.
    """
    ahead = len(own.k) - len(q)
    tiles: list[_Tile] = []
    for start, end in _tile_places(len(own.k)):
        first, stop = max(start, ahead), min(end, len(own.k))
        if first < stop:
            mine = slice(first - ahead, stop - ahead)
            k, v = (_padded(values[start:stop], 0, end - stop) for values in (own.k, own.v))
            queries = _padded(q[mine], first - start, end - stop)
            block = KeyBlock(own.start + start, k, v)
            tiles.append(_Tile(block, queries, PartialAttention(queries), mine, slice(first - start, stop - start)))
    for block in past:
        for tile in tiles:
            attend_block(tile.merged, tile.q, tile.own, block, window, softcap)
    out, log_sum_exp = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for tile in tiles:
        if start := tile.own.start - own.start:
            before = KeyBlock(own.start, _aligned(own.k[:start]), _aligned(own.v[:start]))
            attend_block(tile.merged, tile.q, tile.own, before, window, softcap)
        attend_block(tile.merged, tile.q, tile.own, tile.own, window, softcap)
        out[tile.mine] = tile.merged.out[tile.rows].to(q.dtype)
        log_sum_exp[tile.mine] = tile.merged.log_sum_exp[tile.rows]
    return out, log_sum_exp


def _tile_places(length: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the tiles that hold the first `length` tokens of a section, the first ones short."""
    start, end = 0, FIRST_TILE_TOKENS
    while start < length:
        yield start, end
        start, end = end, end + min(end, TILE_TOKENS)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention among T tokens: q `[T, H, D]`, k and v `[T, G, D]` -> `[T, H, D]`."""
    count = len(q)
    if q.device.type == "cpu":
        q, k, v = _aligned(q), _aligned(k), _aligned(v)  # tokens after the last are seen by none before them
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=len(q) > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)[:count]


def attend_after(
    q: Tensor, own: KeyBlock, past: Iterable[KeyBlock], window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of T tokens among themselves (`own`) and to everything before them, block by block.

    On a CPU each block goes through torch's flash attention (`benchmarks/prompt_pieces.py` compares it with its
    reference, `attend_after_plain`). The operator is private, because the public function keeps the log-sum-exp that
    merging needs to itself; torch's own context parallelism calls it, too. It has no cap of scores.

    Returns:
        `[T, H, D]` in the dtype of q `[T, H, D]`, and the log-sum-exp Float32[T, H] of the scaled scores.
    """
    merged = PartialAttention(q)
    for block in chain(past, (own,)):
        attend_block(merged, q, own, block, window, softcap)
    return merged.out.to(q.dtype), merged.log_sum_exp


def attend_block(
    merged: PartialAttention, q: Tensor, own: KeyBlock, block: KeyBlock, window: int | None, softcap: float | None
) -> None:
    """Add what tokens that begin where `own` does see of one block: of `own` itself, or of one before it."""
    if q.device.type != "cpu" or softcap is not None:
        _attend_block_plain(merged, q, own, block, window, softcap)
        return
    count = _num_seeing(block, own.start, len(q), window)
    if not count:
        return
    # Rows of codes are read as float32.
    k, v = block.k.to(q.dtype), block.v.to(q.dtype)
    if block is own:
        k, v = _aligned(k), _aligned(v)
    queries = _aligned(q[:count])
    masks = window is not None and own.start + count - window > block.start
    mask = _seen(block, own.start, len(queries), len(k), window) if masks else None
    out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=block is own and mask is None,
        attn_mask=None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf),
    )
    merged.add(out[0].transpose(0, 1)[:count], log_sum_exp[0].transpose(0, 1)[:count], slice(count))


def _num_seeing(block: KeyBlock, first: int, num_queries: int, window: int | None) -> int:
    """How many of the queries at positions first, first + 1, ... see a key of the block: the first ones, if not all."""
    if window is None or block.start >= first:
        return num_queries
    return min(max(block.start + len(block.k) - 1 + window - first, 0), num_queries)


def _seen(block: KeyBlock, first: int, num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """Which keys of the block (and those after it, that fill it up) each query sees, Bool[queries, keys]."""
    queries = first + torch.arange(num_queries, device=block.k.device)[:, None]
    keys = block.start + torch.arange(num_keys, device=block.k.device)
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _aligned(values: Tensor) -> Tensor:
    """These tokens `[T, heads, D]` at the beginning of a cache line, and zeros up to a multiple of `TILE_ROWS`.

    torch gives each of its threads a part of one buffer, as long as the queries of a block make it, and the matrix
    library sums in another order where an operand does not begin at a cache line: with an odd number of queries the
    result would depend on which thread computes a head, and a packed prompt's on those before it.
    """
    missing = -len(values) % TILE_ROWS
    if values.data_ptr() % 64:
        return pad(values, (0, 0, 0, 0, 0, missing))
    return _padded(values, 0, missing)


def _padded(values: Tensor, before: int, after: int) -> Tensor:
    """These tokens `[T, heads, D]` with some of zeros around them; the same tensor where there are none."""
    return pad(values, (0, 0, 0, 0, before, after)) if before or after else values


def attend_after_plain(
    q: Tensor, own: KeyBlock, past: Iterable[KeyBlock], window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `attend_after`, in plain torch and float32 throughout."""
    merged = PartialAttention(q)
    for block in chain(past, (own,)):
        _attend_block_plain(merged, q, own, block, window, softcap)
    return merged.out.to(q.dtype), merged.log_sum_exp


def _attend_block_plain(
    merged: PartialAttention, q: Tensor, own: KeyBlock, block: KeyBlock, window: int | None, softcap: float | None
) -> None:
    count = _num_seeing(block, own.start, len(q), window)
    # Without a window the past is seen whole.
    hides = block is own or window is not None
    hidden = ~_seen(block, own.start, count, len(block.k), window) if hides else None
    for rows, scores in _scores(q[:count], block.k, softcap):
        _add(merged, rows, scores if hidden is None else scores.masked_fill_(hidden[rows], -torch.inf), block.v)


def mass_after(
    q: Tensor,
    log_sum_exp: Tensor,
    first: int,
    blocks: Iterable[KeyBlock],
    num_sets: int,
    softcap: float | None = None,
) -> Iterator[ObservedMass]:
    """Attention weights of W consecutive tokens whose log-sum-exp is known, summed over the heads of each index set.

    Args:
        q: `[W, H, D]`, the queries at positions first, first + 1, ...
        log_sum_exp: Float32[W, H], over everything they attend to.
        first: position of the first query.
        blocks: everything they attend to.
        num_sets: J, 1 for one index set per layer or G for one per KV head.
        softcap: of the scores.

    Yields:
        What some of the rows show of one block.
    """
    for block in blocks:
        positions = block.start + torch.arange(len(block.k), device=q.device)
        for rows, scores in _scores(q, block.k, softcap):
            queries = first + torch.arange(rows.start, rows.stop, device=q.device)
            scores = scores.masked_fill_(positions > queries[:, None], -torch.inf)
            num_kv_heads, group = scores.shape[:2]
            total = log_sum_exp[rows].view(-1, num_kv_heads, group).permute(1, 2, 0)[..., None]
            weights = (scores - total).exp_().sum(dim=1)  # [G, rows, N]
            mass = weights.transpose(0, 1) if num_sets > 1 else weights.sum(dim=0)[:, None]
            yield ObservedMass(first + rows.start, block.start, mass)


def _scores(q: Tensor, k: Tensor, softcap: float | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Scaled scores Float32[G, H/G, rows, N] of blocks of queries with k `[N, G, D]`, of bounded size."""
    num_rows, num_heads, head_dim = q.shape
    num_total, num_kv_heads = k.shape[:2]
    keys = k.float().permute(1, 2, 0)[:, None]  # [G, 1, D, N]
    block = max(1, MASS_BLOCK_SCORES // (num_heads * num_total))
    for start in range(0, num_rows, block):
        rows = slice(start, min(start + block, num_rows))
        grouped = (q[rows].float() * head_dim**-0.5).view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = grouped.permute(1, 2, 0, 3) @ keys
        yield rows, scores if softcap is None else softcapped(scores, softcap)


def _add(merged: PartialAttention, rows: slice, scores: Tensor, v: Tensor) -> None:
    """One block of scores `[G, H/G, rows, N]` and the values `[N, G, D]` that they weigh."""
    log_sum_exp = scores.logsumexp(dim=-1, keepdim=True)
    weights = (scores - log_sum_exp).exp_()
    out = weights @ v.float().transpose(0, 1)[:, None]  # [G, H/G, rows, D]
    out = out.permute(2, 0, 1, 3).flatten(1, 2)
    merged.add(out, log_sum_exp[..., 0].permute(2, 0, 1).flatten(1, 2), rows)


def causal_mass(q: Tensor, k: Tensor, first: int, num_sets: int) -> Iterator[tuple[int, Tensor]]:
    """Attention weights of W of S tokens, summed over the heads of each index set, in blocks of rows.

    Args:
        q: `[W, H, D]`, the queries at positions first, first + 1, ...
        k: `[S, G, D]`.
        first: position of the first query.
        num_sets: J, 1 for one index set per layer or G for one per KV head.

    Yields:
        (first, mass): mass Float32[rows, J, S] of the queries at positions first, first + 1, ...
    """
    num_total = len(k)
    columns = torch.arange(num_total, device=q.device)
    for rows, scores in _scores(q, k):
        positions = first + torch.arange(rows.start, rows.stop, device=q.device)
        scores = scores.masked_fill_(columns > positions[:, None], -torch.inf)
        weights = scores.softmax(dim=-1).sum(dim=1)  # [G, rows, S]
        yield first + rows.start, weights.transpose(0, 1) if num_sets > 1 else weights.sum(dim=0)[:, None]
