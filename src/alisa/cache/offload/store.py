"""The tiered store: a capped pool on the device, older rows in lower tiers, the oldest deleted and rebuilt on demand.

Where a row lies follows from its position alone (`alisa.scheduler.placement.base`): a lower tier holds a range of
every sequence's oldest tokens, in all layers alike. Above that, each layer keeps its own hot cache: rows that were
offloaded but selected lately. Rows never change, so a copy below is never stale, and a row leaves the device by being
forgotten.

What moves is decided elsewhere (`StepPlan.moves`). This package carries it out and loads what a layer selects; its only
own decision is which rows leave the hot cache. Calls go one way: `TieredStore` (this file) to `Appender`,
`ChunkReader`, `Loader` and `InFlightStores`, and they to `Residency`, `SlotTable` and the tiers.
Sequences share no rows here, because bounds and moves are a sequence's own.

A little over 400 lines, because it is all of `RowStore` for tiers and the wiring of the parts; what they do is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.base import KVChunk, check_continues, check_opening
from alisa.cache.offload.appender import Appender
from alisa.cache.offload.chunks import ChunkReader
from alisa.cache.offload.hidden import HiddenStateCache
from alisa.cache.offload.inflight import InFlightStores
from alisa.cache.offload.loader import Loader
from alisa.cache.offload.residency import Eviction, Residency
from alisa.cache.offload.table import Level, SlotTable
from alisa.cache.offload.tiers import LowerTier
from alisa.cache.offload.traffic import TrafficMeter
from alisa.cache.offload.transfer import TransferBuffer, Transfers, transfer_buffers
from alisa.cache.pool import allocate_pool
from alisa.cache.row_ids import NOWHERE, RowIds
from alisa.cache.store import KVStore
from alisa.errors import CapacityError
from alisa.kernels.base import AppendKernel, Codec, Selection, Slots
from alisa.outputs import Medium, Traffic
from alisa.scheduler.plan import Move, ScheduledChunk, StepPlan


@dataclass(slots=True)
class _Sequence:
    """Bookkeeping of one open sequence."""

    bounds: list[int]
    """See `alisa.scheduler.placement.base`."""
    rebuildable: int
    """Positions below this keep a hidden state."""
    length: int = 0


class TieredStore:
    """A capped device pool over lower tiers.

    What a cap of the device's memory covers: the pool (`num_rows` rows of each layer), two staging buffers
    (`staging_rows` rows of one layer together), and, where main memory is the device, rows and hidden states on their
    way (`in_flight_bytes`) and the tables that say where rows lie (`table_bytes`). The tables grow with the tokens that
    exist; `alisa.cache.capacity` knows how far, and shares out a cap. A pool on a CPU takes no memory until rows are
    written.

    Args:
        num_layers: L.
        codec: writes and reads rows.
        num_rows: R, tokens of the device pool; each layer has as many slots.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence, in tokens.
        tiers: lower tiers, nearest first; their row size is the codec's.
        hidden: where the layer inputs of deletable tokens lie; None: nothing can be deleted.
        rebuildable: first tokens of every sequence whose layer input is kept.
        eviction: who leaves the hot cache first.
        overlap: whether rows move while the arithmetic runs.
        staging_rows: rows through which a selection larger than the pool is read; at least a piece.
        piece_columns: columns of the smallest piece that the decode kernel takes.
        in_flight_bytes: rows that never lie on the device and are not written yet take at most half of this; hidden
            states that are being read take at most three eighths, or what three of them take.
        device: where the pool lies; None: in main memory.
        append: writes rows in place; None: through the codec.
        make_buffers: how transfers reach the device's memory.
        memory: UInt8[L * R + staging_rows, row_bytes]; None: its own.

    Raises:
        CapacityError: the machine has less memory than the pool.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        codec: Codec,
        num_rows: int,
        max_num_seqs: int,
        max_length: int,
        tiers: Sequence[LowerTier],
        hidden: HiddenStateCache | None = None,
        rebuildable: int = 0,
        eviction: Eviction = "lru",
        overlap: bool = True,
        staging_rows: int = 512,
        piece_columns: int = 64,
        in_flight_bytes: int = 1 << 26,
        device: torch.device | None = None,
        append: AppendKernel | None = None,
        make_buffers: Callable[[Tensor], tuple[TransferBuffer, ...]] = transfer_buffers,
        memory: Tensor | None = None,
    ) -> None:
        self.codec = codec
        self.max_num_seqs = max_num_seqs
        self.max_length = max_length
        self.token_bytes = num_layers * codec.format.row_bytes
        self._num_layers = num_layers
        self._device = device or torch.device("cpu")
        self._rebuildable = rebuildable
        row_bytes = codec.format.row_bytes
        pool_rows = num_layers * num_rows
        if memory is None:
            memory = allocate_pool(1, pool_rows + staging_rows, row_bytes, self._device)[0]
        piece_columns = min(piece_columns, max_length)
        num_buffers = 2 if staging_rows >= 2 * piece_columns else 1
        buffer_rows = staging_rows // num_buffers
        assert buffer_rows >= piece_columns, f"{staging_rows} rows of staging are less than a piece"
        self._pool = make_buffers(memory[:pool_rows].view(num_layers, num_rows, row_bytes))
        staged = memory[pool_rows : pool_rows + num_buffers * buffer_rows]
        staging = make_buffers(staged.view(num_buffers, buffer_rows, row_bytes))
        self._row_ids = RowIds(max_num_seqs, max_length)
        self._residency = Residency(num_layers, num_rows, self._row_ids, eviction)
        self._levels = tuple(Level(tier, SlotTable(tier.num_rows)) for tier in tiers)
        self._hidden = hidden
        self._transfers = Transfers(overlap=overlap)
        self._meter = TrafficMeter(self._transfers)
        self._in_flight = InFlightStores(
            self._pool, self._residency, self._transfers, self._meter, in_flight_bytes // 2
        )
        self._loader = Loader(
            self._pool,
            codec,
            self._row_ids,
            self._residency,
            self._levels,
            hidden,
            self._in_flight,
            self._transfers,
            self._meter,
            in_flight_bytes // 8,  # read ahead, and twice where a selection comes in pieces
        )
        self._reader = ChunkReader(
            memory,
            self._pool,
            staging,
            piece_columns,
            self._row_ids,
            self._residency,
            self._loader,
            self._in_flight,
            self._meter,
            self._device,
            make_buffers,
        )
        self._appender = Appender(
            self._pool,
            codec,
            append,
            self._row_ids,
            self._residency,
            self._levels,
            hidden,
            self._loader,
            self._in_flight,
            self._device,
        )
        self._open: dict[int, _Sequence] = {}
        self._ends = np.zeros(max_num_seqs, np.int64)  # bounds[0] of every request index

    @classmethod
    def over(
        cls,
        flat: KVStore,
        *,
        tiers: Sequence[LowerTier],
        hidden: HiddenStateCache | None = None,
        rebuildable: int = 0,
        eviction: Eviction = "lru",
        overlap: bool = True,
        piece_columns: int = 64,
        in_flight_bytes: int = 1 << 26,
    ) -> TieredStore:
        """A store that has taken over a flat pool and its sequences, with tiers below.

        The pool's spare rows are the staging. Where rows may be rebuilt, there are no sequences yet: their hidden
        states are kept from the start.
        """
        store = cls(
            num_layers=flat.num_layers,
            codec=flat.codec,
            num_rows=flat.num_rows,
            max_num_seqs=flat.max_num_seqs,
            max_length=flat.max_length,
            tiers=tiers,
            hidden=hidden,
            rebuildable=rebuildable,
            eviction=eviction,
            overlap=overlap,
            staging_rows=flat.spare_rows,
            piece_columns=piece_columns,
            in_flight_bytes=in_flight_bytes,
            device=flat.device,
            append=flat.append_kernel,
            memory=flat.memory,
        )
        store._adopt(dict(flat.sequences()))
        return store

    def _adopt(self, sequences: Mapping[int, NDArray[np.int32]]) -> None:
        """Sequences whose rows lie in these slots of every layer are open."""
        assert not (sequences and self._rebuildable), "rows that may be deleted need their hidden states"
        for req_idx, slots in sequences.items():
            self._row_ids.extend(req_idx, len(slots))
            self._open[req_idx] = _Sequence([0] * (len(self._levels) + 1), 0, len(slots))
        self._reserve()
        if sequences:
            ids = [self._row_ids.of(req_idx, 0, len(slots)) for req_idx, slots in sequences.items()]
            self._residency.adopt(np.concatenate(ids), np.concatenate(list(sequences.values())))

    # --- sequences -----------------------------------------------------------------------------------------------

    def open(self, req_idx: int, num_tokens: int) -> None:
        """See `RowStore.open`."""
        check_opening(self, req_idx, num_tokens, in_use=req_idx in self._open)
        self._open[req_idx] = _Sequence([0] * (len(self._levels) + 1), min(self._rebuildable, num_tokens))
        self._ends[req_idx] = 0

    def release(self, req_idx: int) -> None:
        """See `RowStore.release`; waits for this sequence's rows that are on their way, and for no others."""
        self.truncate(req_idx, 0)
        del self._open[req_idx]
        self._row_ids.release(req_idx)
        self._transfers.forgive(req_idx)

    def truncate(self, req_idx: int, length: int) -> None:
        """See `RowStore.truncate`; waits as `release` does where one of the rows has a place below."""
        sequence = self._open[req_idx]
        ids = self._row_ids.of(req_idx, length, sequence.length)
        # What has no place below is on no way; most often the last few tokens have none.
        if any(bool((table.find(ids) != NOWHERE).any()) for table in self._tables()):
            self._in_flight.wait_for(req_idx)
            self._loader.wait_for(req_idx)
        self._loader.forget(ids)
        self._residency.release(ids)
        for table in self._tables():
            table.give_back(ids)
        sequence.length = length
        sequence.bounds = [min(bound, length) for bound in sequence.bounds]
        self._ends[req_idx] = sequence.bounds[0]

    def length(self, req_idx: int) -> int:
        """See `RowStore.length`."""
        return self._open[req_idx].length

    def bounds(self, req_idx: int) -> tuple[int, ...]:
        """See `RowStore.bounds`."""
        return tuple(self._open[req_idx].bounds)

    def rebuildable(self, req_idx: int) -> int:
        """See `RowStore.rebuildable`."""
        return self._open[req_idx].rebuildable

    # --- a step --------------------------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> None:
        """See `RowStore.begin`."""
        for chunk in plan.chunks:
            check_continues(chunk, self._open[chunk.req_idx].length, self.max_length)
        for chunk in plan.chunks:
            self._row_ids.extend(chunk.req_idx, chunk.end)
        self._reserve()
        self._residency.tick()
        self._in_flight.poll_stores()
        if plan.prefill:
            # No layer will ask for what was prefetched, and in the step after this one it may have to leave.
            self._loader.wait_all_loads()
        for move in plan.moves:
            self._move(move)
        self._appender.begin(plan.chunks, self._ends, [self._open[c.req_idx].rebuildable for c in plan.chunks])
        for chunk in plan.chunks:
            self._open[chunk.req_idx].length = chunk.end
        req_indices = np.array([chunk.req_idx for chunk in plan.chunks], np.int64)
        counts = np.array([1 if plan.prefill else chunk.count for chunk in plan.chunks])
        self._reader.begin(req_indices, self._ends[req_indices], counts)

    def _reserve(self) -> None:
        """Every table has room for the row ids that there are."""
        self._residency.reserve(self._row_ids.capacity)
        for table in self._tables():
            table.reserve(self._row_ids.capacity)

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """See `RowStore.append`."""
        self._appender.append(layer, k, v, hidden)

    def copy(self, layer: int, chunk: ScheduledChunk) -> None:
        """See `RowStore.copy`."""
        assert self._hidden is None, "what may be deleted is rebuilt from the layer input, and there is none"
        assert chunk.source is not None, "there is nothing to copy"
        self._appender.put(layer, self._reader.read(layer, chunk.source, chunk.start, chunk.end))

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """See `RowStore.chunks`; one set for all heads."""
        return self._reader.chunks(layer, selection)

    def device_rows(self) -> None:
        """Some rows may lie below."""

    def prefetch(self, layer: int, req_indices: tuple[int, ...], selection: Selection) -> None:
        """See `RowStore.prefetch`."""
        lengths = np.array([self._open[req_idx].length for req_idx in req_indices])
        self._reader.prefetch(layer, np.array(req_indices, np.int64), lengths, selection)

    def read(self, layer: int, req_idx: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        return self.codec.decode(self._reader.read(layer, req_idx, start, end))

    def drain(self) -> None:
        """Nothing is on its way."""
        self._in_flight.drain()
        self._loader.wait_all_loads()

    # --- accounts ------------------------------------------------------------------------------------------------

    @property
    def used_rows(self) -> int:
        """Tokens whose rows exist somewhere."""
        return sum(sequence.length - sequence.bounds[-1] for sequence in self._open.values())

    @property
    def deleted_tokens(self) -> int:
        """Tokens of open sequences whose rows are deleted."""
        return sum(sequence.bounds[-1] for sequence in self._open.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of main memory that say where rows lie."""
        return self._row_ids.nbytes + self._residency.nbytes + sum(table.nbytes for table in self._tables())

    def nbytes(self, medium: Medium) -> int:
        """See `RowStore.nbytes`."""
        if medium is Medium.DEVICE:
            return self._residency.num_resident * self.codec.format.row_bytes
        used = sum(table.num_taken * self.token_bytes for tier, table in self._levels if tier.medium is medium)
        if self._hidden is not None and self._hidden.tier.medium is medium:
            used += self._hidden.table.num_taken * self._num_layers * self._hidden.row_bytes
        return used

    def traffic(self) -> Traffic:
        """See `RowStore.traffic`."""
        return self._meter.take()

    def failed(self) -> dict[int, str]:
        """See `RowStore.failed`."""
        return self._transfers.take_failed()

    def check(self) -> None:
        """See `RowStore.check`."""
        self._row_ids.check()
        self._residency.check()
        for table in self._tables():
            table.check()
        for req_idx, sequence in self._open.items():
            edges = [sequence.length, *sequence.bounds]
            assert edges == sorted(edges, reverse=True), f"req_idx {req_idx}: bounds {sequence.bounds} cross"
            ids = self._row_ids.of(req_idx, 0, sequence.length)
            for level, (_, table) in enumerate(self._levels):
                held = np.flatnonzero(table.find(ids) != NOWHERE)
                expected = np.arange(sequence.bounds[level + 1], sequence.bounds[level])
                assert np.array_equal(held, expected), f"req_idx {req_idx}: tier {level} holds {held}, not {expected}"
            for layer, slots in enumerate(self._residency.slots):
                home = slots[ids[sequence.bounds[0] :]]
                assert bool((home != NOWHERE).all()), f"req_idx {req_idx}: a row is not in the pool of layer {layer}"
        for level, (_, table) in enumerate(self._levels):
            held = sum(sequence.bounds[level] - sequence.bounds[level + 1] for sequence in self._open.values())
            assert table.num_taken == held, f"tier {level} holds {table.num_taken} tokens, not {held}"

    def close(self) -> None:
        """See `RowStore.close`."""
        self.drain()
        self._transfers.close()
        for tier, _ in self._levels:
            tier.close()
        if self._hidden is not None:
            self._hidden.tier.close()

    def _tables(self) -> Iterator[SlotTable]:
        for _, table in self._levels:
            yield table
        if self._hidden is not None:
            yield self._hidden.table

    def _move(self, move: Move) -> None:
        """Carry out one move for the rows that exist; the appender places those of this step, from the bounds."""
        sequence = self._open[move.req_idx]
        media = [Medium.DEVICE, *(tier.medium for tier, _ in self._levels), None]
        source, target = media.index(move.source), media.index(move.target)
        ids = self._row_ids.of(move.req_idx, move.start, move.end)
        existing = ids[: max(sequence.length - move.start, 0)]
        if target <= len(self._levels):
            self._offload(move.req_idx, ids, existing, source, target)
        else:
            assert move.end <= sequence.rebuildable, f"positions up to {move.end} are deleted and cannot be rebuilt"
            self._meter.deleted_rows += len(existing) * self._num_layers
        if source == 0:
            # What this step writes past the device, and what has a hidden state, may leave the hot cache at any time.
            self._residency.safe[ids if target > len(self._levels) else ids[len(existing) :]] = True
        else:
            self._before_free(move.req_idx, existing)
            self._levels[source - 1].table.give_back(ids)
        for level in range(source, target):
            sequence.bounds[level] = max(sequence.bounds[level], move.end)
        self._ends[move.req_idx] = sequence.bounds[0]

    def _offload(self, req_idx: int, ids: Slots, existing: Slots, source: int, target: int) -> None:
        """Rows get slots in a lower tier, and those that exist are copied there."""
        tier, table = self._levels[target - 1]
        if len(ids) > table.num_free:
            raise CapacityError(
                f"{len(ids)} tokens of req_idx {req_idx} are to go to a tier that has room for {table.num_free}."
            )
        slots = table.take(ids)[: len(existing)]
        if len(existing) and source == 0:
            self._in_flight.start_store(req_idx, existing, tier, slots)
        elif len(existing):
            self._in_flight.move(req_idx, self._levels[source - 1], existing, tier, slots)

    def _before_free(self, req_idx: int, ids: Slots) -> None:
        """Nothing is on its way to or from rows whose slots below are about to have another owner."""
        self._in_flight.before_free(req_idx, ids)
        if self._residency.any_resident(ids):
            self._loader.wait_for(req_idx)
