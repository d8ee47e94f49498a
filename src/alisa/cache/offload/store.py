"""The tiered store: a capped pool on the device, older rows in lower tiers, the oldest deleted and rebuilt on demand.

Where a row lies follows from its position alone (`alisa.scheduler.placement.base`): a lower tier holds a range of
every sequence's oldest tokens, in all layers alike. Above that, each layer keeps its own hot cache: rows that have
gone down but were selected lately. Rows never change, so a copy below is never stale, and a row leaves the device by
being forgotten.

What moves is decided elsewhere (`StepPlan.moves`). This class carries it out and brings back what a layer selects; its
only own decision is who leaves the hot cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.base import KVChunk
from alisa.cache.offload.buffers import HostShelf, Shelf, shelves
from alisa.cache.offload.hidden import Remnants
from alisa.cache.offload.residency import NOWHERE, Eviction, Residency
from alisa.cache.offload.tiers import Bytes, LowerTier, Places, Slots
from alisa.cache.offload.transfer import ReqIndices, Some, Ticket, Transfers
from alisa.errors import CapacityError
from alisa.kernels.base import AppendKernel, Codec, Selection
from alisa.outputs import Medium, Traffic
from alisa.scheduler.plan import Move, Segment, StepPlan

_JOB_ROWS = 64
"""Rows that one thread fetches in one go; more are shared among threads."""

_BYTES_ON_THE_WAY_DOWN = 1 << 26
"""Encoded rows of a prompt that may wait to be written before prefill waits for them."""


@dataclass(slots=True)
class _Seq:
    """Bookkeeping of one open sequence."""

    bounds: list[int]
    """See `alisa.scheduler.placement.base`."""
    rebuildable: int
    """Positions below this keep a remnant."""
    length: int = 0


class _Table:
    """Slots of one lower pool: (req_idx, position) -> slot, the same in all layers."""

    def __init__(self, num_slots: int, max_num_seqs: int, max_length: int) -> None:
        self.slots = np.full((max_num_seqs, max_length), NOWHERE, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots

    @property
    def num_used(self) -> int:
        """Slots taken."""
        return self._num_slots - len(self._free)

    def take(self, req_idx: int, start: int, end: int) -> Slots:
        """Slots for positions [start, end); neighbours as long as there are any."""
        if end - start > len(self._free):
            raise CapacityError(
                f"{end - start} tokens of req_idx {req_idx} are to go to a tier that has room for {len(self._free)}."
            )
        split = len(self._free) - (end - start)
        taken = np.array(self._free[split:][::-1], np.int64)
        del self._free[split:]
        self.slots[req_idx, start:end] = taken
        return taken

    def give_back(self, req_idx: int, start: int, end: int) -> None:
        """The slots of these positions are free again; positions without one are passed over."""
        slots = self.slots[req_idx, start:end]
        self._free.extend(sorted(slots[slots != NOWHERE].tolist(), reverse=True))
        self.slots[req_idx, start:end] = NOWHERE

    def check(self) -> None:
        """Assert that every slot is free or taken once."""
        taken = self.slots[self.slots != NOWHERE].tolist()
        assert sorted([*taken, *self._free]) == list(range(self._num_slots)), "a slot below is lost or doubled"


class _Going(NamedTuple):
    """Rows of one request index on their way down; below `end` they are safe when the ticket is done."""

    ticket: Ticket
    req_idx: int
    end: int


@dataclass(slots=True)
class _Step:
    """The new tokens of the running step, by where their rows go. Indices point into the step's tokens."""

    home: Slots
    home_slots: NDArray[np.int32]
    """Int32[L, n]: device slots, other ones in every layer."""
    below: list[tuple[int, Slots, Slots]] = field(default_factory=list)
    """(tier, tokens, its slots): written past the device, as in the prefill of a prompt larger than the pool."""
    remnants: tuple[Slots, Slots] | None = None
    """(tokens, slots) whose layer inputs are kept."""
    req_indices: tuple[int, ...] = ()
    """The req_indices of the step's segments, in order."""
    owners: ReqIndices = field(default_factory=lambda: np.empty(0, np.int64))
    """Int64[n]: the request index of each token."""


class TieredStore:
    """A capped device pool over lower tiers.

    Args:
        num_layers: L.
        codec: writes and reads rows.
        num_rows: R, tokens of the device pool; each layer has as many slots.
        max_num_seqs: sequences that can be open at the same time.
        max_length: longest sequence, in tokens.
        tiers: lower tiers, nearest first; their row size is the codec's.
        remnants: where the layer inputs of deletable tokens lie; None: nothing can be deleted.
        rebuildable: first tokens of every sequence whose layer input is kept.
        eviction: who leaves the hot cache first.
        overlap: whether rows move beside the arithmetic.
        staging_rows: rows of each of two buffers through which a selection larger than the pool is read.
        device: where the pool lies; None: in main memory.
        append: writes rows in place; None: through the codec.
        make_shelves: how transfers reach the device's memory.
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
        remnants: Remnants | None = None,
        rebuildable: int = 0,
        eviction: Eviction = "lru",
        overlap: bool = True,
        staging_rows: int = 256,
        device: torch.device | None = None,
        append: AppendKernel | None = None,
        make_shelves: Callable[[Tensor], tuple[Shelf, ...]] = shelves,
    ) -> None:
        self.codec = codec
        self.max_num_seqs = max_num_seqs
        self.token_bytes = num_layers * codec.format.row_bytes
        self._num_layers = num_layers
        self.max_length = max_length
        self._tiers = tuple(tiers)
        self._tables = [_Table(tier.num_rows, max_num_seqs, max_length) for tier in tiers]
        self._append = append
        self._make_shelves = make_shelves
        self._remnants = remnants
        self._remnant_table = _Table(remnants.tier.num_rows if remnants else 0, max_num_seqs, max_length)
        self._rebuildable = rebuildable
        row_bytes = codec.format.row_bytes
        self._device = device or torch.device("cpu")
        self._rows_pool = make_shelves(
            torch.empty(num_layers, num_rows, row_bytes, dtype=torch.uint8, device=self._device)
        )
        self._staging = make_shelves(torch.empty(2, staging_rows, row_bytes, dtype=torch.uint8, device=self._device))
        self._residency = Residency(num_layers, num_rows, max_num_seqs, max_length, eviction)
        self._open: dict[int, _Seq] = {}
        self._ends = np.zeros(max_num_seqs, np.int64)  # bounds[0] of every request index, for look-ups
        self._transfers = Transfers(overlap=overlap)
        self._arriving: list[list[Ticket]] = [[] for _ in range(num_layers)]
        self._ahead = [np.empty(0, np.int32) for _ in range(num_layers)]  # slots filled for the next step
        self._going: deque[_Going] = deque()
        self._written: list[list[Ticket]] = [[] for _ in range(num_layers)]  # straight to a tier, layer by layer
        self._bytes_going = 0
        self._step = _Step(np.empty(0, np.int64), np.empty((num_layers, 0), np.int32))
        self._counts = dict.fromkeys(("fetched", "stored", "deleted", "rebuilt", "bytes", "lookups", "hits"), 0)
        self._reported = (0.0, 0.0)

    # --- sequences -----------------------------------------------------------------------------------------------

    def open(self, req_idx: int, num_tokens: int) -> None:
        """See `RowStore.open`."""
        if num_tokens > self.max_length:
            raise CapacityError(
                f"A sequence of {num_tokens} tokens is longer than the {self.max_length} that the KV store was made "
                "for; raise --max-model-len."
            )
        assert 0 <= req_idx < self.max_num_seqs, f"request index {req_idx} of {self.max_num_seqs}"
        assert req_idx not in self._open, f"request index {req_idx} is in use"
        self._open[req_idx] = _Seq([0] * (len(self._tiers) + 1), min(self._rebuildable, num_tokens))
        self._ends[req_idx] = 0

    def release(self, req_idx: int) -> None:
        """See `RowStore.release`; waits for transfers, whose slots are about to have another owner."""
        self._settle()
        state = self._open.pop(req_idx)
        self._residency.release(req_idx, state.length)
        for table in (*self._tables, self._remnant_table):
            table.give_back(req_idx, 0, self.max_length)
        self._transfers.forgive(req_idx)

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
        for segment in plan.segments:
            length = self._open[segment.req_idx].length
            if segment.start != length or segment.end > self.max_length:
                raise CapacityError(
                    f"Request index {segment.req_idx} has {length} of at most {self.max_length} tokens; positions "
                    f"{segment.start} to {segment.end - 1} do not continue it."
                )
        self._residency.tick()
        self._land(block=False)
        if plan.prefill:
            # No layer will ask for what was fetched ahead, and in the step after this one it may have to leave.
            self._arrive_everywhere()
        for move in plan.moves:
            self._move(move)
        self._place(plan.segments)
        for segment in plan.segments:
            self._open[segment.req_idx].length = segment.end

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """See `RowStore.append`."""
        step = self._step
        if len(step.home) == len(k) and self._append is not None:
            slots = torch.from_numpy(step.home_slots[layer]).to(self._device, torch.int64)
            self._append(self._rows_pool[layer].rows, self.codec.format, slots, k, v)
        else:
            rows = self.codec.encode(k, v)
            self._rows_pool[layer].put(step.home_slots[layer], rows[torch.from_numpy(step.home).to(self._device)])
            if step.below:
                below = rows.cpu().numpy()
                for tier, tokens, slots_below in step.below:
                    self._write_past(layer, self._tiers[tier], slots_below, below, tokens, step.owners[tokens])
        if step.remnants is not None and self._remnants is not None:
            tokens, slots_below = step.remnants
            remnants = self._remnants.encode(hidden[torch.from_numpy(tokens).to(self._device)])
            places = np.arange(len(tokens))
            self._write_past(layer, self._remnants.tier, slots_below, remnants, places, step.owners[tokens])

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """See `RowStore.chunks`; one set for all heads."""
        req_indices, positions, real = _asked(self._step.req_indices, selection)
        slots = self._residency.slots[layer][req_indices[:, None], positions]
        below = real & (positions < self._ends[req_indices][:, None])
        missing = real & (slots == NOWHERE)
        num_missing = int(missing.sum())
        self._count_hits(layer, slots[below])
        self._residency.touch(layer, slots[real & ~missing])
        self._arrive(layer)
        if num_missing:
            row, column = np.nonzero(missing)
            wanted, at = req_indices[row], positions[row, column].astype(np.int64)
            placed = self._residency.place(layer, wanted, at)
            if placed is None and self._going:
                self._land(block=True)
                placed = self._residency.place(layer, wanted, at)
            if placed is None:
                yield from self._in_pieces(layer, req_indices, positions, slots, real, missing)
                return
            slots[row, column] = placed
            self._transfers.wait(self._load(layer, wanted, at, self._rows_pool[layer], placed))
        slots[~real] = 0
        yield KVChunk(
            self._rows_pool[layer].rows, torch.from_numpy(slots)[:, None].to(self._device), selection.counts, None, None
        )

    def prefetch(self, layer: int, req_indices: tuple[int, ...], selection: Selection) -> None:
        """See `RowStore.prefetch`."""
        at_req_indices, positions, real = _asked(req_indices, selection)
        slots = self._residency.slots[layer][at_req_indices[:, None], positions]
        # The newest token of the next step has no row yet: it is the last one of each sequence.
        known = real & (positions < np.array([self._open[req_idx].length for req_idx in req_indices])[:, None])
        self._residency.touch(layer, slots[known & (slots != NOWHERE)], ahead=True)
        row, column = np.nonzero(known & (slots == NOWHERE))
        if not len(row):
            return
        wanted, at = at_req_indices[row], positions[row, column].astype(np.int64)
        placed = self._residency.place(layer, wanted, at, ahead=True)
        if placed is not None:
            self._ahead[layer] = np.append(self._ahead[layer], placed)
            self._arriving[layer].append(self._load(layer, wanted, at, self._rows_pool[layer], placed))

    def read(self, layer: int, req_idx: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        positions = np.arange(start, end)
        slots = self._residency.slots[layer, req_idx, start:end]
        here, absent = np.flatnonzero(slots != NOWHERE), np.flatnonzero(slots == NOWHERE)
        self._arrive(layer)
        pool = self._rows_pool[layer].rows
        present = pool.index_select(0, torch.from_numpy(slots[here]).to(self._device))
        if not len(absent):
            return self.codec.decode(present)
        [target] = self._make_shelves(pool.new_empty(1, end - start, pool.shape[1]))
        target.put(here, present)
        req_indices = np.full(len(absent), req_idx)
        self._transfers.wait(self._load(layer, req_indices, positions[absent], target, absent))
        return self.codec.decode(target.rows)

    # --- accounts ------------------------------------------------------------------------------------------------

    @property
    def used_rows(self) -> int:
        """Tokens whose rows exist somewhere."""
        return sum(req_idx.length - req_idx.bounds[-1] for req_idx in self._open.values())

    @property
    def deleted_tokens(self) -> int:
        """Tokens of open sequences whose rows are deleted."""
        return sum(req_idx.bounds[-1] for req_idx in self._open.values())

    def nbytes(self, medium: Medium) -> int:
        """See `RowStore.nbytes`."""
        if medium is Medium.DEVICE:
            return int(self._residency.num_resident.sum()) * self.codec.format.row_bytes
        tiers = zip(self._tiers, self._tables, strict=True)
        used = sum(table.num_used * self.token_bytes for tier, table in tiers if tier.medium is medium)
        if self._remnants is not None and self._remnants.tier.medium is medium:
            used += self._remnant_table.num_used * self._num_layers * self._remnants.row_bytes
        return used

    def traffic(self) -> Traffic:
        """See `RowStore.traffic`."""
        counts, transfers = self._counts, self._transfers
        wait_s, busy_s = self._reported
        self._reported = (transfers.wait_s, transfers.busy_s)
        self._counts = dict.fromkeys(counts, 0)
        return Traffic(
            fetched_rows=counts["fetched"],
            stored_rows=counts["stored"],
            deleted_rows=counts["deleted"],
            rebuilt_rows=counts["rebuilt"],
            moved_bytes=counts["bytes"],
            lookups=counts["lookups"],
            hits=counts["hits"],
            wait_s=transfers.wait_s - wait_s,
            busy_s=transfers.busy_s - busy_s,
        )

    def failed(self) -> dict[int, str]:
        """See `RowStore.failed`."""
        return self._transfers.take_failed()

    def check(self) -> None:
        """See `RowStore.check`."""
        self._residency.check()
        for table in (*self._tables, self._remnant_table):
            table.check()
        for index, req_idx in self._open.items():
            edges = [req_idx.length, *req_idx.bounds]
            assert edges == sorted(edges, reverse=True), f"req_idx {index}: bounds {req_idx.bounds} cross"
            for level, table in enumerate(self._tables):
                held = np.flatnonzero(table.slots[index] != NOWHERE)
                expected = np.arange(req_idx.bounds[level + 1], req_idx.bounds[level])
                assert np.array_equal(held, expected), f"req_idx {index}: tier {level} holds {held}, not {expected}"
            home = self._residency.slots[:, index, req_idx.bounds[0] : req_idx.length]
            assert bool((home != NOWHERE).all()), f"req_idx {index}: a row that never left is not on the device"

    def close(self) -> None:
        """See `RowStore.close`."""
        self._settle()
        self._transfers.close()
        for tier in self._tiers:
            tier.close()
        if self._remnants is not None:
            self._remnants.tier.close()

    # --- how it is done ------------------------------------------------------------------------------------------

    def _move(self, move: Move) -> None:
        """Carry out one move for the rows that exist; those of this step are noted by `_place`, from the bounds."""
        req_idx = self._open[move.req_idx]
        media = [Medium.DEVICE, *(tier.medium for tier in self._tiers), None]
        source, target = media.index(move.source), media.index(move.target)
        end = min(move.end, req_idx.length)
        if target <= len(self._tiers):
            slots = self._tables[target - 1].take(move.req_idx, move.start, move.end)[: end - move.start]
            if end > move.start:
                self._push(move.req_idx, move.start, end, source, target - 1, slots)
        else:
            assert move.end <= req_idx.rebuildable, f"positions up to {move.end} are deleted and cannot be rebuilt"
            self._counts["deleted"] += max(end - move.start, 0) * self._num_layers
        if source == 0:
            # In order behind what is on its way: rows that this step writes past the device, and deleted ones.
            self._going.append(_Going(Ticket(), move.req_idx, move.end))
        if source > 0:
            self._vacate(move)
            self._tables[source - 1].give_back(move.req_idx, move.start, move.end)
        for level in range(source, target):
            req_idx.bounds[level] = max(req_idx.bounds[level], move.end)
        self._ends[move.req_idx] = req_idx.bounds[0]

    def _vacate(self, move: Move) -> None:
        """Nothing is on its way to or from rows whose slots below are about to have another owner."""
        if self._residency.safe[move.req_idx] < move.end:
            self._land(block=True)
        self._flush()
        if (self._residency.slots[:, move.req_idx, move.start : move.end] != NOWHERE).any():
            self._arrive_everywhere()

    def _push(self, req_idx: int, start: int, end: int, source: int, tier: int, slots: Slots) -> None:
        """Copy rows [start, end) of all layers from a level to a lower tier, in the background."""
        count = end - start
        target = self._tiers[tier]
        self._counts["stored"] += count * self._num_layers
        self._counts["bytes"] += count * self.token_bytes
        if source == 0:
            from_slots = self._residency.slots[:, req_idx, start:end].astype(np.int64)
            fence = self._rows_pool[0].fence()

            def down(some: Some) -> None:
                for layer, shelf in enumerate(self._rows_pool):
                    shelf.give(partial(target.write, layer, slots[some]), from_slots[layer, some], fence)

            self._going.append(_Going(self._transfers.start(down, np.full(count, req_idx)), req_idx, end))
            return
        # From tier to tier: done at once, because the source's slots are about to be given away.
        self._settle()
        origin, old = self._tiers[source - 1], self._tables[source - 1].slots[req_idx, start:end].copy()

        def across(some: Some) -> None:
            buffer = np.empty((count, self.codec.format.row_bytes), np.uint8)
            rows = np.arange(count)[some]
            for layer in range(self._num_layers):
                origin.read(layer, old[some], buffer, rows)
                target.write(layer, slots[some], buffer, rows)

        self._transfers.wait(self._transfers.start(across, np.full(count, req_idx)))

    def _place(self, segments: Sequence[Segment]) -> None:
        """Decide for every new token where its rows go: device slots in each layer, or slots below."""
        req_indices = (
            np.concatenate([np.full(s.count, s.req_idx) for s in segments]) if segments else np.empty(0, np.int64)
        )
        positions = np.concatenate([np.arange(s.start, s.end) for s in segments]) if segments else req_indices
        home = np.flatnonzero(positions >= self._ends[req_indices])
        home_slots = np.empty((self._num_layers, len(home)), np.int32)
        for layer in range(self._num_layers):
            placed = self._residency.place(layer, req_indices[home], positions[home])
            if placed is None:
                self._land(block=True)
                self._arrive(layer)
                placed = self._residency.place(layer, req_indices[home], positions[home], at_any_cost=True)
            if placed is None:
                raise CapacityError(f"{len(home)} new tokens have no room in the device pool of layer {layer}.")
            home_slots[layer] = placed
        step = _Step(home, home_slots, req_indices=tuple(segment.req_idx for segment in segments), owners=req_indices)
        for tier, table in enumerate(self._tables):
            slots = table.slots[req_indices, positions]
            tokens = np.flatnonzero(slots != NOWHERE)
            if len(tokens):
                step.below.append((tier, tokens, slots[tokens]))
        kept = np.flatnonzero(positions < [self._open[req_idx].rebuildable for req_idx in req_indices.tolist()])
        if len(kept):
            for segment in segments:
                end = min(segment.end, self._open[segment.req_idx].rebuildable)
                if end > segment.start:
                    self._remnant_table.take(segment.req_idx, segment.start, end)
            step.remnants = (kept, self._remnant_table.slots[req_indices[kept], positions[kept]])
        self._step = step

    def _write_past(
        self, layer: int, tier: LowerTier, slots: Slots, source: Bytes, source_rows: Slots, req_indices: ReqIndices
    ) -> None:
        """Write rows that never lie on the device; prefill waits when too many are on their way."""
        num_bytes = len(slots) * source.shape[1]
        self._counts["stored"] += len(slots)
        self._counts["bytes"] += num_bytes
        self._bytes_going += num_bytes
        if self._bytes_going > _BYTES_ON_THE_WAY_DOWN:
            self._flush()
            self._bytes_going = num_bytes

        def write(some: Some) -> None:
            tier.write(layer, slots[some], source, source_rows[some])

        self._written[layer].append(self._transfers.start(write, req_indices))

    def _load(
        self, layer: int, req_indices: NDArray[np.int64], positions: NDArray[np.int64], target: Shelf, places: Places
    ) -> Ticket:
        """Start to bring rows that are not on the device to these places of `target`."""
        for ticket in self._written[layer]:
            self._transfers.wait(ticket)
        self._written[layer].clear()
        ticket = Ticket()
        rest = np.ones(len(req_indices), bool)
        for tier, table in zip(self._tiers, self._tables, strict=True):
            slots = table.slots[req_indices, positions]
            found = np.flatnonzero(slots != NOWHERE)
            rest[found] = False
            for first in range(0, len(found), _JOB_ROWS):
                some = found[first : first + _JOB_ROWS]
                ticket.jobs += self._fetch(tier, layer, slots[some], target, places[some], req_indices[some]).jobs
        self._counts["fetched"] += len(req_indices) - int(rest.sum())
        self._counts["bytes"] += (len(req_indices) - int(rest.sum())) * self.codec.format.row_bytes
        if rest.any():
            self._start_rebuild(ticket, layer, req_indices[rest], positions[rest], target, places[rest])
        return ticket

    def _fetch(
        self, tier: LowerTier, layer: int, slots: Slots, target: Shelf, places: Places, req_indices: ReqIndices
    ) -> Ticket:
        fence = target.fence()

        def fetch(some: Some) -> None:
            target.receive(partial(tier.read, layer, slots[some]), places[some], fence)

        return self._transfers.start(fetch, req_indices)

    def _start_rebuild(
        self,
        ticket: Ticket,
        layer: int,
        req_indices: NDArray[np.int64],
        positions: NDArray[np.int64],
        target: Shelf,
        places: Places,
    ) -> None:
        """Fetch the remnants of deleted rows; whoever waits for the ticket makes the rows from them, in one product."""
        remnants = self._remnants
        assert remnants is not None, "rows are deleted only where remnants are kept"
        slots = self._remnant_table.slots[req_indices, positions]
        buffer = HostShelf(torch.empty(len(slots), remnants.row_bytes, dtype=torch.uint8))
        ticket.jobs += self._fetch(remnants.tier, layer, slots, buffer, np.arange(len(slots)), req_indices).jobs
        self._counts["rebuilt"] += len(slots)
        self._counts["bytes"] += buffer.rows.nbytes

        def rebuild() -> None:
            target.put(places, remnants.rows(layer, buffer.rows.to(self._device), positions, self.codec))

        ticket.finish = rebuild

    def _count_hits(self, layer: int, slots: NDArray[np.int32]) -> None:
        """Take note of look-ups of rows that have gone down; one that was fetched ahead for them is no hit."""
        brought = int(np.count_nonzero(slots == NOWHERE))
        if len(self._ahead[layer]):
            brought += int(np.count_nonzero(np.isin(slots, self._ahead[layer])))
            self._ahead[layer] = np.empty(0, np.int32)
        self._counts["lookups"] += len(slots)
        self._counts["hits"] += len(slots) - brought

    def _in_pieces(
        self,
        layer: int,
        req_indices: NDArray[np.int64],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        real: NDArray[np.bool_],
        missing: NDArray[np.bool_],
    ) -> Iterator[KVChunk]:
        """What is on the device, then the rest through two buffers in turn: one is read while the other fills."""
        row, column = np.nonzero(real & ~missing)
        if len(row):
            yield self._chunk(self._rows_pool[layer].rows, row, column, slots[row, column])
        row, column = np.nonzero(missing)
        size = len(self._staging[0].rows)
        pieces = [slice(first, first + size) for first in range(0, len(row), size)]

        def fill(index: int) -> Ticket:
            some = pieces[index]
            wanted, at = req_indices[row[some]], positions[row[some], column[some]].astype(np.int64)
            return self._load(layer, wanted, at, self._staging[index % 2], np.arange(len(wanted)))

        coming = fill(0)
        for index, some in enumerate(pieces):
            self._transfers.wait(coming)
            if index + 1 < len(pieces):
                coming = fill(index + 1)
            count = len(row[some])
            yield self._chunk(self._staging[index % 2].rows, row[some], column[some], np.arange(count, dtype=np.int32))

    def _chunk(self, rows: Tensor, row: Slots, column: Slots, slots: NDArray[np.int32]) -> KVChunk:
        """Entries (sequence, column) of a selection, in order of sequences, as a padded part."""
        sequences, first, counts = np.unique(row, return_index=True, return_counts=True)
        place = (np.repeat(np.arange(len(sequences)), counts), np.arange(len(row)) - np.repeat(first, counts))
        padded = np.zeros((len(sequences), counts.max()), np.int32)
        columns = np.zeros((len(sequences), counts.max()), np.int64)
        padded[place], columns[place] = slots, column
        return KVChunk(
            rows,
            torch.from_numpy(padded)[:, None].to(self._device),
            torch.from_numpy(counts.astype(np.int32)).to(self._device),
            torch.from_numpy(sequences).to(self._device),
            torch.from_numpy(columns).to(self._device),
        )

    def _arrive(self, layer: int) -> None:
        """Everything that was fetched ahead for this layer is there."""
        for ticket in self._arriving[layer]:
            self._transfers.wait(ticket)
        self._arriving[layer].clear()

    def _arrive_everywhere(self) -> None:
        for layer in range(self._num_layers):
            self._arrive(layer)

    def _land(self, *, block: bool) -> None:
        """Rows that have reached the tier below may leave the device; block: wait until all have."""
        while self._going and (block or self._going[0].ticket.is_done):
            going = self._going.popleft()
            self._transfers.wait(going.ticket)
            self._residency.safe[going.req_idx] = max(self._residency.safe[going.req_idx], going.end)

    def _flush(self) -> None:
        """Everything that was written past the device is below."""
        for tickets in self._written:
            for ticket in tickets:
                self._transfers.wait(ticket)
            tickets.clear()

    def _settle(self) -> None:
        """Nothing is on its way."""
        self._land(block=True)
        self._flush()
        self._arrive_everywhere()


def _asked(
    req_indices: Sequence[int], selection: Selection
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """ReqIndices [B], positions [B, K], and which of them are no padding."""
    positions = selection.positions[:, 0].cpu().numpy()
    real = np.arange(positions.shape[1]) < np.array(selection.num_tokens)[:, None]
    return np.array(req_indices, np.int64), positions, real
