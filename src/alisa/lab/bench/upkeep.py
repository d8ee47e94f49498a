"""What a decode step does besides attention, each against its reference: writing rows, choosing, keeping scores."""

from __future__ import annotations

import torch

from alisa.budget import Budget, state_tokens
from alisa.cache.codec import make_codec
from alisa.kernels.base import SelectionKernels, StepBatch
from alisa.kernels.native.kernels import CpuKernels
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.lab.bench.case import Call, Candidate, Case, Role
from alisa.lab.bench.cases import AppendCase, PolicyCase
from alisa.policy.swa import SparseWindow
from alisa.spec import AttentionShape

_ARENA_STEPS = 16
"""The pool holds this many times the tokens of one call, and each call writes elsewhere."""

_SELECT_BYTES_PER_SCORE, _SELECT_BYTES_PER_SLOT = 8, 4
_OBSERVE_BYTES_PER_SLOT = 2 * 8 + 2 * 4 + 4 + 4
"""Local sum (float64) and bucket (float32) read and written, mass and position read."""


def append_case(case: AppendCase, kernels: CpuKernels) -> Case:
    """New tokens become rows, in an order of slots that is not theirs."""
    generator = torch.Generator().manual_seed(0)
    codec = make_codec(case.row_format)
    dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
    shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    num_rows = _ARENA_STEPS * case.num_tokens
    slots = torch.randperm(num_rows, generator=generator).view(_ARENA_STEPS, case.num_tokens)
    rows = torch.zeros(num_rows, codec.format.row_bytes, dtype=torch.uint8)

    def kernel(call: int) -> None:
        kernels.append(rows, codec.format, slots[call % _ARENA_STEPS], k, v)

    def reference(call: int) -> None:
        rows.index_copy_(0, slots[call % _ARENA_STEPS], codec.encode(k, v))

    return Case(kernel, lambda: [Candidate(Role.REFERENCE, "torch reference", reference)], case.num_bytes)


def policy_case(case: PolicyCase, kernels: CpuKernels) -> Case:
    """One call of the policy for one layer, through the interface that the engine uses."""
    budget = Budget(case.sparsity)
    recent, older = budget.split(case.num_tokens - 1)
    num_slots = recent + older + 1
    num_scores = case.num_tokens - 1 - recent
    if case.work == "select":
        num_bytes = num_scores * _SELECT_BYTES_PER_SCORE + num_slots * _SELECT_BYTES_PER_SLOT
    else:
        num_bytes = num_slots * _OBSERVE_BYTES_PER_SLOT
    return Case(
        _policy_call(case, kernels),
        lambda: [Candidate(Role.REFERENCE, "torch reference", _policy_call(case, ReferenceSelection()))],
        case.num_seqs * num_bytes,
        num_calls=case.num_layers,
    )


def _policy_call(case: PolicyCase, kernels: SelectionKernels) -> Call:
    """A policy in the middle of a decode step of all sequences, and its next piece of work."""
    generator = torch.Generator().manual_seed(0)
    policy, num_earlier = SparseWindow(Budget(case.sparsity)), case.num_tokens - 1
    shape = AttentionShape(case.num_layers, num_heads=1, num_kv_heads=1, head_dim=1, scale=1.0)
    state = policy.start(
        shape,
        max_num_seqs=case.num_seqs,
        num_tokens=case.num_seqs * state_tokens(case.num_tokens),
        max_len=case.num_tokens,
        device=torch.device("cpu"),
        kernels=kernels,
    )
    num_rows = policy.observation_window(num_earlier)
    # Attention mass is steep: a few tokens have most of it.
    mass = torch.rand(num_rows, 1, num_earlier, generator=generator) ** 8
    for req_idx in range(case.num_seqs):
        state.open(req_idx, case.num_tokens)
        state.reserve(req_idx, case.num_tokens)
        for layer in range(case.num_layers):
            state.observe_prompt(layer, req_idx, num_earlier - num_rows, 0, mass.roll(req_idx + layer, dims=2))
    state.begin(
        StepBatch(
            req_indices=tuple(range(case.num_seqs)),
            lengths=(case.num_tokens,) * case.num_seqs,
            req_index=torch.arange(case.num_seqs),
            length_counts=torch.full((case.num_seqs,), case.num_tokens, dtype=torch.int32),
        )
    )
    query = torch.empty(case.num_seqs, 1, 1)  # history decides, not the query
    if case.work == "select":
        return lambda call: state.select(call % case.num_layers, query)
    selections = [state.select(layer, query) for layer in range(case.num_layers)]
    shares = torch.rand(selections[0].positions.shape, generator=generator)
    return lambda call: state.on_attended(call % case.num_layers, selections[call % case.num_layers], shares)
