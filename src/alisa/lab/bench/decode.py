"""Decode attention over chosen rows: the kernel, its torch reference, and what else could do the same work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alisa.cache.codec import TORCH_DTYPES, make_codec
from alisa.kernels.base import AppendKernel, Codec, DecodeKernel
from alisa.kernels.reference.decode import decode_attention
from alisa.lab.bench.case import Candidate, Case, Role
from alisa.lab.bench.cases import DecodeCase

_CPU = torch.device("cpu")

_FILL_TOKENS = 4096
"""Random values are made for this many tokens and written again and again: what they are does not change the time."""


class DecodeKernels(DecodeKernel, Protocol):
    """Decode attention, and what writes the rows that it reads."""

    @property
    def append(self) -> AppendKernel:
        """Encodes K and V in place."""
        ...


def decode_case(case: DecodeCase, kernels: DecodeKernels, device: torch.device = _CPU) -> Case:
    """The case, built on a device; with its rivals it takes three to six times the memory of its rows."""
    generator = torch.Generator().manual_seed(0)
    codec = make_codec(case.row_format)
    value_dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
    rows = _random_rows(case, codec, kernels, value_dtype, generator, device)
    table = _slot_table(case, generator)
    slots = _chosen_slots(case, table, generator).to(device)
    counts = torch.full((case.num_seqs,), case.num_slots, dtype=torch.int32, device=device)
    q = torch.randn(case.num_seqs, case.num_heads, case.head_dim, generator=generator).to(device, value_dtype)

    def rivals() -> Iterator[Candidate]:
        yield from _dense(case, q, rows, codec, table.to(device))
        if case.num_sets == 1 and case.dtype in TORCH_DTYPES:
            yield from _gather(case, q, rows, slots)
        if case.share < 1.0:  # all rows gathered as float32 take gigabytes, and nobody would do it
            yield Candidate(
                Role.REFERENCE, "torch reference", lambda _: decode_attention(q, rows, codec, slots, counts)
            )

    return Case(lambda _: kernels(q, rows, codec, slots, counts), rivals, case.num_bytes)


def _random_rows(
    case: DecodeCase,
    codec: Codec,
    kernels: DecodeKernels,
    value_dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """The pool, UInt8[B*S, row_bytes]."""
    num_rows = case.num_seqs * case.num_tokens
    rows = torch.empty(num_rows, codec.format.row_bytes, dtype=torch.uint8, device=device)
    shape = (min(_FILL_TOKENS, num_rows), case.num_kv_heads, case.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(device, value_dtype) for _ in range(2))
    for first in range(0, num_rows, _FILL_TOKENS):
        slots = torch.arange(first, min(first + _FILL_TOKENS, num_rows), device=device)
        kernels.append(rows, codec.format, slots, k[: len(slots)], v[: len(slots)])
    return rows


def _slot_table(case: DecodeCase, generator: torch.Generator) -> Tensor:
    """Where each token's row lies, Int64[B, S]."""
    num_rows = case.num_seqs * case.num_tokens
    slots = torch.randperm(num_rows, generator=generator) if case.shuffled else torch.arange(num_rows)
    return slots.view(case.num_seqs, case.num_tokens)


def _chosen_slots(case: DecodeCase, table: Tensor, generator: torch.Generator) -> Tensor:
    """Slots of the most recent tokens and of random older ones, in the order of the tokens; Int32[B, J, K]."""
    num_older = case.num_older
    first_recent = case.num_tokens - (case.num_slots - num_older)
    recent = torch.arange(first_recent, case.num_tokens)
    slots = torch.empty(case.num_seqs, case.num_sets, case.num_slots, dtype=torch.int32)
    for seq in range(case.num_seqs):
        for index_set in range(case.num_sets):
            older = torch.randperm(first_recent, generator=generator)[:num_older].sort().values
            slots[seq, index_set] = table[seq, torch.cat((older, recent))]
    return slots


def _sdpa(case: DecodeCase, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused attention of q `[B, H, D]` over k and v `[B, G, S, D]`.

    Query heads that share K and V stand as rows of one head, which spares torch from repeating K and V for each.
    """
    grouped = q.view(case.num_seqs, case.num_kv_heads, -1, case.head_dim)
    return scaled_dot_product_attention(grouped, k, v).view_as(q)


def _dense(case: DecodeCase, q: Tensor, rows: Tensor, codec: Codec, table: Tensor) -> Iterator[Candidate]:
    """Fused attention over every row, kept as a cache of tensors `[B, G, S, D]`.

    In bfloat16 it is kept as float32 too: without bf16 instructions torch's bf16 attention can be several times slower
    than the same in float32, and a ratio against it would flatter the kernel.
    """
    for dtype in dict.fromkeys((q.dtype, torch.float32)):
        shape = (case.num_seqs, case.num_kv_heads, case.num_tokens, case.head_dim)
        cache = [torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2)]
        for seq in range(case.num_seqs):
            for half, values in zip(cache, codec.decode(rows.index_select(0, table[seq])), strict=True):
                half[seq] = values.transpose(0, 1)
        yield _dense_candidate(case, q.to(dtype), *cache)


def _dense_candidate(case: DecodeCase, q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    return Candidate(Role.DENSE, f"dense SDPA {_name(q.dtype)}", lambda _: _sdpa(case, q, k, v))


def _gather(case: DecodeCase, q: Tensor, rows: Tensor, slots: Tensor) -> Iterator[Candidate]:
    """The chosen rows copied into one tensor in every call, then fused attention over it."""
    for dtype in dict.fromkeys((q.dtype, torch.float32)):
        yield _gather_candidate(case, q, rows, slots, dtype)


def _gather_candidate(case: DecodeCase, q: Tensor, rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Candidate:
    def call(_: int) -> Tensor:
        chosen = rows.index_select(0, slots.view(-1)).view(TORCH_DTYPES[case.dtype]).to(dtype)
        chosen = chosen.view(case.num_seqs, case.num_slots, 2, case.num_kv_heads, case.head_dim)
        k, v = (chosen[:, :, half].transpose(1, 2) for half in range(2))
        return _sdpa(case, q.to(dtype), k, v)

    return Candidate(Role.GATHER, f"gather + SDPA {_name(dtype)}", call)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
