"""Sketches: ranking every token for a query, completing what is read, and sketching new keys, each against torch."""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Ranking, Sketch
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sketch import sketch_scores
from alisa.lab.bench.case import Candidate, Case, Role
from alisa.lab.bench.cases import SketchCase


def sketch_case(case: SketchCase, kernels: CpuKernels) -> Case:
    """The case with random keys, the same for every sequence: what they are does not change the time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(case.num_seqs * case.num_tokens).view(case.num_seqs, case.num_tokens)
    keys = torch.randn(case.num_tokens, case.num_kv_heads, case.head_dim, generator=generator).bfloat16()
    sketch = _sketched(keys, ids, case.bits, kernels)
    plain = ReferenceSelection()
    if case.work == "append":
        new = (sketch, ids[0], keys)
        reference = Candidate(Role.REFERENCE, "torch reference", lambda _: plain.sketch_append(*new))
        return Case(lambda _: kernels.sketch_append(*new), lambda: [reference], case.num_bytes)
    query = torch.randn(case.num_seqs, case.num_heads, case.head_dim, generator=generator).bfloat16()
    starts, lengths = ids[:, 0].contiguous(), torch.full((case.num_seqs,), case.num_tokens, dtype=torch.int32)
    if case.work == "scores":
        table = (query, sketch, starts, lengths, case.num_tokens, case.num_sets)
        reference = Candidate(Role.REFERENCE, "torch reference", lambda _: sketch_scores(*table))
        return Case(lambda _: kernels.sketch_scores(*table), lambda: [reference], case.num_bytes)
    older, recent = case.num_tokens // 10, case.num_tokens // 10 + 1
    rows = torch.ones(case.num_seqs * case.num_sets, dtype=torch.int32)
    budgets = (rows * (case.num_tokens - recent), rows * older, rows * (older + recent))
    values = _sketched(keys, ids, 2, kernels)
    ranking = Ranking(starts, lengths, *budgets, older + recent, case.num_tokens, case.num_sets)
    step = (query, sketch, values, ranking)
    reference = Candidate(Role.REFERENCE, "torch reference", lambda _: plain.sketch_complete(*step))
    return Case(lambda _: kernels.sketch_complete(*step), lambda: [reference], case.num_bytes)


def _sketched(vectors: Tensor, ids: Tensor, bits: int, kernels: CpuKernels) -> Sketch:
    """Vectors `[N, G, D]` at the rows Int64[B, N] of each sequence."""
    num_rows, (_, num_kv_heads, head_dim) = ids.numel(), vectors.shape
    codes = torch.empty(num_rows, num_kv_heads, -(-head_dim * bits // 8), dtype=torch.uint8)
    sketch = Sketch(codes, torch.empty(num_rows, num_kv_heads, 2, dtype=torch.float16), bits)
    for own_ids in ids:
        kernels.sketch_append(sketch, own_ids, vectors)
    return sketch
