"""Decode attention over rows, writing them, prompts, and choosing what to read."""

from __future__ import annotations

from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from alisa.budget import state_tokens
from alisa.cache.codec import make_codec
from alisa.cache.store import KVStore
from alisa.kernels.base import (
    AppendKernel,
    Attended,
    DecodeKernel,
    KeyBlock,
    PrefillKernel,
    SelectionKernels,
    StepBatch,
)
from alisa.kernels.base import Selection as Chosen
from alisa.outputs import Phase
from alisa.planner.hardware import Attention, SelectionPrices
from alisa.planner.profile.clock import fit, seconds
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.scheduler.plan import ScheduledChunk, StepPlan
from alisa.spec import ModelSpec, RowFormat

_LAYOUTS = ((12, 12, 64), (4, 32, 64), (32, 32, 128))
"""(KV heads, query heads, values of a head)."""
_ARENA_BYTES = 1 << 27
_CPU = torch.device("cpu")
_OBSERVE_REPEATS = 9


def measure_attention(
    kv_dtype: str, dtype: torch.dtype, attend: DecodeKernel, append: AppendKernel | None
) -> Attention:
    """Rows of this dtype read by queries of that one."""
    amounts: list[tuple[float, ...]] = []
    times: list[float] = []
    for num_kv_heads, num_heads, head_dim in _LAYOUTS:
        codec = make_codec(RowFormat(kv_dtype, num_kv_heads, head_dim))
        row_bytes = codec.format.row_bytes
        num_rows = min(_ARENA_BYTES // row_bytes, 1 << 15)
        k = torch.randn(256, num_kv_heads, head_dim)
        pool = codec.encode(k, k).repeat(-(-num_rows // 256), 1)[:num_rows]
        for batch, share in ((1, 0.25), (8, 0.25), (8, 1.0)):
            slots = _slots(num_rows, batch, share)
            counts = torch.full((batch,), slots.shape[2], dtype=torch.int32)
            q = torch.randn(batch, num_heads, head_dim).to(dtype)
            taken = seconds(lambda q=q, s=slots, c=counts, a=pool, codec=codec: attend(q, a, codec, s, c), repeats=3)
            rows = batch * slots.shape[2]
            amounts.append((1.0, rows * row_bytes, rows * num_heads * head_dim))
            times.append(taken)
    _, byte_s, value_s = fit(amounts, times)
    call_s, append_call_s, append_row_s = _calls(kv_dtype, dtype, attend, append)
    return Attention(
        call_s=call_s, byte_s=byte_s, value_s=value_s, append_call_s=append_call_s, append_row_s=append_row_s
    )


def _slots(num_rows: int, batch: int, share: float) -> torch.Tensor:
    """Int32[B, 1, K]: an ascending share of each sequence's own stretch of the pool."""
    stretch = num_rows // batch
    count = max(1, int(stretch * share))
    chosen = [torch.randperm(stretch)[:count].sort().values + req_idx * stretch for req_idx in range(batch)]
    return torch.stack(chosen).to(torch.int32)[:, None]


def _calls(
    kv_dtype: str, dtype: torch.dtype, attend: DecodeKernel, append: AppendKernel | None
) -> tuple[float, float, float]:
    """(reading next to nothing, appending, appending a row more), through the store."""
    codec = make_codec(RowFormat(kv_dtype, 8, 64))
    store = KVStore(num_layers=1, codec=codec, num_rows=512, max_num_seqs=64, max_length=8, device=_CPU, append=append)
    req_indices = range(64)
    for req_idx in req_indices:
        store.open(req_idx, 8)
    hidden = torch.randn(64, 512).to(dtype)
    k = torch.randn(64, 8, 64).to(dtype)
    times = {}
    for batch in (1, 64):
        plan = StepPlan(
            0,
            Phase.DEVICE,
            False,
            tuple(ScheduledChunk(req_idx, store.length(req_idx), 1) for req_idx in req_indices[:batch]),
        )
        store.begin(plan)
        few = k[:batch]
        times[batch] = seconds(lambda few=few: store.append(0, few, few, hidden), repeats=30)
    row_s = max(times[64] - times[1], 0.0) / 63
    plan = StepPlan(0, Phase.DEVICE, False, (ScheduledChunk(req_indices[0], store.length(req_indices[0]), 1),))
    store.begin(plan)
    one = torch.zeros(1, 1, 1, dtype=torch.int32)
    counts = torch.ones(1, dtype=torch.int32)
    q = torch.randn(1, 8, 64).to(dtype)

    def read() -> None:
        for chunk in store.chunks(0, Chosen(one, counts, (1,))):
            attend(q, chunk.rows, codec, chunk.slots, counts)

    return seconds(read, repeats=50), times[1], row_s


def measure_prompt(dtype: torch.dtype, kernel: PrefillKernel) -> tuple[float, float]:
    """(causal attention, explicit weights of the last rows): seconds for each pair of positions and query value."""
    length, num_heads, head_dim, num_observed = 256, 12, 64, 26
    q = torch.randn(length, num_heads, head_dim).to(dtype)
    own = KeyBlock(0, q, q)
    taken = seconds(lambda: kernel(q, own, len(q), tuple, 0, 1))

    def observe() -> float:
        """The weights alone: they are computed when they are asked for."""
        _, observed = kernel(q, own, len(q), tuple, num_observed, 1)
        started = perf_counter()
        list(observed)
        return perf_counter() - started

    observe()
    explicit = median(observe() for _ in range(_OBSERVE_REPEATS))
    values = length * (length + 1) / 2 * num_heads * head_dim
    return taken / values, explicit / (num_observed * length * num_heads * head_dim)


def measure_selection(policy: SelectionPolicy, spec: ModelSpec, kernels: SelectionKernels) -> SelectionPrices:
    """Choosing and keeping scores with this policy, for four layers of this shape."""
    capacity, max_num_seqs = 1024, 16
    state = policy.start(
        spec.attention,
        max_num_seqs=max_num_seqs,
        num_tokens=max_num_seqs * state_tokens(capacity),
        max_len=capacity,
        device=_CPU,
        kernels=kernels,
    )
    amounts: list[tuple[float, ...]] = []
    times: list[float] = []
    begins: list[float] = []
    for batch, length in ((1, 64), (1, 1000), (4, 500), (16, 128), (16, 1000)):
        req_indices, lengths = tuple(range(batch)), (length,) * batch
        for req_idx in req_indices:
            state.open(req_idx, capacity)
            state.reserve(req_idx, capacity)
        req_index, counts = torch.tensor(req_indices), torch.tensor(lengths, dtype=torch.int32)
        step = StepBatch(req_indices, lengths, req_index, counts)
        begins.append(seconds(lambda step=step: state.begin(step)))
        query = torch.randn(batch, spec.num_heads, spec.head_dim)
        keys = torch.randn(batch, spec.num_kv_heads, spec.head_dim)
        recent, older = policy.reads(length - 1)
        mass = torch.rand(batch, 1, recent + older + 1)
        if policy.query_aware:  # every key is written before it is scored
            positions = torch.arange(length).repeat(batch)
            every = keys.repeat_interleave(length, dim=0)
            for layer in range(spec.num_layers):
                state.on_append(layer, req_index.repeat_interleave(length), positions, every, every)

        work = partial(_choose, state, spec.num_layers, req_index, counts.long() - 1, keys, query, mass)
        times.append(seconds(work) / spec.num_layers)
        ranked = batch * (length - 1)
        read = batch * (recent + older + 1)
        scored = ranked * spec.q_size if policy.query_aware else 0
        amounts.append((1.0, float(batch), 0.0 if scored else float(ranked), float(read), float(scored)))
    call_s, row_s, candidate_s, read_s, value_s = fit(amounts, times)
    return SelectionPrices(
        step_s=sum(begins) / len(begins),
        call_s=call_s,
        row_s=row_s,
        candidate_s=candidate_s,
        read_s=read_s,
        value_s=value_s,
    )


def _choose(
    state: PolicyState, num_layers: int, req_index: Tensor, positions: Tensor, keys: Tensor, query: Tensor, mass: Tensor
) -> None:
    """What a step asks of the policy, in every layer."""
    for layer in range(num_layers):
        state.on_append(layer, req_index, positions, keys, keys)
        state.on_attended(layer, state.select(layer, query), mass)
        state.combine(layer, Attended(query, mass, query[..., 0]))
