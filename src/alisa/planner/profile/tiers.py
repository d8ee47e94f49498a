"""Rows below the device: finding them, fetching them, sending them down, and rebuilding deleted ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from alisa.cache.codec import make_codec
from alisa.cache.offload.hidden import HiddenStateCache, hidden_format
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import DiskTier
from alisa.cache.offload.transfer import JOB_ROWS, RowSubset, TransferHandle, Transfers
from alisa.kernels.base import AppendKernel, Bytes, MoveRows, Selection, Slots
from alisa.outputs import Medium, Phase
from alisa.planner.hardware import Link
from alisa.planner.profile.clock import fit, seconds
from alisa.scheduler.plan import Move, ScheduledChunk, StepPlan
from alisa.spec import RowFormat

_ROW_BYTES = (1536, 4096, 16384)
_NUM_ROWS = (16, 256, 2048)


class Lookup(NamedTuple):
    """Seconds of bookkeeping in one layer."""

    call_s: float
    row_s: float
    place_s: float


def measure_link(directory: Path, move_rows: MoveRows) -> tuple[Link, Link]:
    """(reading, writing) rows of a file, as many threads at once as the store uses.

    The file is as large as the rows that are moved, so that it lies in the system's page cache; a tier larger than
    the free memory is as slow as the disk itself, which a plan for this machine does not know.
    """
    transfers = Transfers()
    generator = np.random.default_rng(0)
    amounts: list[tuple[float, ...]] = []
    reads: list[float] = []
    writes: list[float] = []
    for row_bytes in _ROW_BYTES:
        memory = np.ones((max(_NUM_ROWS), row_bytes), np.uint8)
        tier = DiskTier(directory, 1, 2 * len(memory), row_bytes, move_rows)
        tier.write(0, np.arange(2 * len(memory)), memory, np.arange(2 * len(memory)) % len(memory))
        for count in _NUM_ROWS:
            slots = generator.permutation(2 * len(memory))[:count].astype(np.int64)
            reads.append(seconds(partial(_move_rows, transfers, tier.read, slots, memory)))
            writes.append(seconds(partial(_move_rows, transfers, tier.write, slots, memory)))
            amounts.append((1.0, float(count), float(count * row_bytes)))
        tier.close()
    transfers.close()
    links = [fit(amounts, times) for times in (reads, writes)]
    read, write = (Link(call_s=c, row_s=r, bytes_per_s=1 / max(b, 1e-15)) for c, r, b in links)
    return read, write


def _move_rows(transfers: Transfers, work: Callable[..., None], slots: Slots, memory: Bytes) -> None:
    """Move rows between slots of a layer and the first rows of the memory."""
    indices = np.arange(len(slots))
    handle = TransferHandle()
    for first in range(0, len(slots), JOB_ROWS):
        piece = slice(first, first + JOB_ROWS)

        def move(subset: RowSubset, piece: slice = piece) -> None:
            work(0, slots[piece][subset], memory, indices[piece][subset])

        handle.add(transfers.start(move, np.zeros(len(indices[piece]), np.int64)))
    transfers.wait(handle)


def measure_lookup(directory: Path, move_rows: MoveRows, append: AppendKernel | None) -> Lookup:
    """Finding rows that all are on the device, and making room for new ones."""
    num_layers, max_num_seqs, length = 4, 16, 256
    codec = make_codec(RowFormat("bfloat16", 4, 64))
    store = TieredStore(
        num_layers=num_layers,
        codec=codec,
        num_rows=max_num_seqs * length,
        max_num_seqs=max_num_seqs,
        max_length=length,
        tiers=(DiskTier(directory, num_layers, max_num_seqs * length, codec.format.row_bytes, move_rows),),
        append=append,
    )
    amounts: list[tuple[float, ...]] = []
    times: list[float] = []
    places: list[float] = []
    req_indices = range(max_num_seqs)
    for req_idx in req_indices:
        store.open(req_idx, length)
    store.begin(StepPlan(0, Phase.DEVICE, True, tuple(ScheduledChunk(req_idx, 0, 128) for req_idx in req_indices)))
    moves = tuple(Move(req_idx, 0, 64, Medium.DEVICE, Medium.DISK) for req_idx in req_indices)
    step = 1
    for batch in (1, 16):
        for count in (16, 120):
            chunks = tuple(ScheduledChunk(req_idx, store.length(req_idx), 1) for req_idx in req_indices[:batch])
            places.append(seconds(lambda s=chunks, m=moves, n=step: _begin(store, s, m, n), repeats=1))
            moves = ()
            positions = torch.arange(count, dtype=torch.int32).expand(batch, 1, count).contiguous()
            chosen = Selection(positions, torch.full((batch,), count, dtype=torch.int32), (count,) * batch)
            times.append(seconds(lambda chosen=chosen: list(store.chunks(0, chosen))))
            amounts.append((1.0, float(batch * count)))
            step += 1
    store.close()
    call_s, row_s = fit(amounts, times)
    return Lookup(call_s, row_s, sum(places[1:]) / len(places[1:]) / num_layers)


def _begin(store: TieredStore, chunks: tuple[ScheduledChunk, ...], moves: tuple[Move, ...], step: int) -> None:
    """One step later; called twice by the clock, so that the chunks move on with the lengths."""
    now = tuple(ScheduledChunk(s.req_idx, store.length(s.req_idx), 1) for s in chunks)
    below = moves if store.bounds(chunks[0].req_idx)[0] == 0 else ()
    store.begin(StepPlan(step, Phase.DEVICE_HOST, False, now, below))


def measure_rebuild(directory: Path, move_rows: MoveRows, dtype: torch.dtype) -> tuple[float, float]:
    """(a call, a row): rows from hidden states whose product costs nothing."""
    hidden_size, name = 1024, str(dtype).removeprefix("torch.")
    codec, kept = make_codec(RowFormat(name, 16, 64)), make_codec(hidden_format(name, hidden_size))
    tier = DiskTier(directory, 1, 16, kept.format.row_bytes, move_rows)
    made = torch.randn(512, 16, 64).to(dtype)
    hidden_states = HiddenStateCache(tier, kept, lambda layer, hidden, positions: (made[: len(hidden)],) * 2, dtype)
    amounts: list[tuple[float, ...]] = []
    times: list[float] = []
    for count in (8, 128, 512):
        encoded = hidden_states.encode(torch.randn(count, hidden_size).to(dtype))
        positions = np.arange(count)
        work = seconds(lambda e=encoded, p=positions: hidden_states.rows(0, e, p, codec))
        amounts.append((1.0, float(count)))
        times.append(work)
    tier.close()
    call_s, row_s = fit(amounts, times)
    return call_s, row_s
