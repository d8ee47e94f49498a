"""Key sketches: ranking every token for a query, and sketching new keys, each against its torch reference."""

from __future__ import annotations

import torch

from alisa.kernels.base import Sketch
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sketch import sketch_scores
from alisa.lab.bench.case import Candidate, Case, Role
from alisa.lab.bench.cases import SketchCase


def sketch_case(case: SketchCase, kernels: CpuKernels) -> Case:
    """The case with random keys, the same for every sequence: what they are does not change the time."""
    generator = torch.Generator().manual_seed(0)
    num_rows = case.num_seqs * case.num_tokens
    codes = torch.empty(num_rows, case.num_kv_heads, -(-case.head_dim * case.bits // 8), dtype=torch.uint8)
    ranges = torch.empty(num_rows, case.num_kv_heads, 2, dtype=torch.float16)
    ids = torch.arange(num_rows).view(case.num_seqs, case.num_tokens)
    keys = torch.randn(case.num_tokens, case.num_kv_heads, case.head_dim, generator=generator).bfloat16()
    sketch = Sketch(codes, ranges, case.bits)
    for own_ids in ids:
        kernels.sketch_append(sketch, own_ids, keys)
    if case.work == "append":
        new = (sketch, ids[0], keys)
        reference = Candidate(Role.REFERENCE, "torch reference", lambda _: ReferenceSelection().sketch_append(*new))
        return Case(lambda _: kernels.sketch_append(*new), lambda: [reference], case.num_bytes)
    query = torch.randn(case.num_seqs, case.num_heads, case.head_dim, generator=generator).bfloat16()
    lengths = torch.full((case.num_seqs,), case.num_tokens, dtype=torch.int32)
    table = (query, sketch, ids[:, 0].contiguous(), lengths, case.num_tokens, case.num_sets)
    reference = Candidate(Role.REFERENCE, "torch reference", lambda _: sketch_scores(*table))
    return Case(lambda _: kernels.sketch_scores(*table), lambda: [reference], case.num_bytes)
