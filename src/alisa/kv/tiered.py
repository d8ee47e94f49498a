"""The tiered store: a capped arena on the device, older rows in lower tiers, the oldest deleted and rebuilt on demand.

Where a row lies follows from its position alone (`alisa.schedule.base`): a lower tier holds a range of every sequence's
oldest tokens, in all layers alike. Above that, each layer keeps its own hot cache: rows that have gone down but were
selected lately. Rows never change, so a copy below is never stale, and a row leaves the device by being forgotten.

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

from alisa.errors import CapacityError
from alisa.kv.base import AppendKernel, Part, Span
from alisa.kv.remnant import Remnants
from alisa.kv.residency import NOWHERE, Eviction, Residency
from alisa.kv.shelf import HostShelf, Shelf, shelves
from alisa.kv.tiers import Bytes, LowerTier, Places, Slots
from alisa.kv.transfer import Lanes, Some, Ticket, Transfers
from alisa.types import Codec, Medium, Move, Segment, Selection, StepPlan, Traffic

_JOB_ROWS = 64
"""Rows that one thread fetches in one go; more are shared among threads."""

_BYTES_ON_THE_WAY_DOWN = 1 << 26
"""Encoded rows of a prompt that may wait to be written before prefill waits for them."""


@dataclass(slots=True)
class _Lane:
    """Bookkeeping of one open sequence."""

    bounds: list[int]
    """See `alisa.schedule.base`."""
    rebuildable: int
    """Positions below this keep a remnant."""
    length: int = 0


class _Table:
    """Slots of one lower arena: (lane, position) -> slot, the same in all layers."""

    def __init__(self, num_slots: int, num_lanes: int, max_length: int) -> None:
        self.slots = np.full((num_lanes, max_length), NOWHERE, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots

    @property
    def num_used(self) -> int:
        """Slots taken."""
        return self._num_slots - len(self._free)

    def take(self, lane: int, start: int, end: int) -> Slots:
        """Slots for positions [start, end); neighbours as long as there are any."""
        if end - start > len(self._free):
            raise CapacityError(
                f"{end - start} tokens of lane {lane} are to go to a tier that has room for {len(self._free)}."
            )
        split = len(self._free) - (end - start)
        taken = np.array(self._free[split:][::-1], np.int64)
        del self._free[split:]
        self.slots[lane, start:end] = taken
        return taken

    def give_back(self, lane: int, start: int, end: int) -> None:
        """The slots of these positions are free again; positions without one are passed over."""
        slots = self.slots[lane, start:end]
        self._free.extend(sorted(slots[slots != NOWHERE].tolist(), reverse=True))
        self.slots[lane, start:end] = NOWHERE

    def check(self) -> None:
        """Assert that every slot is free or taken once."""
        taken = self.slots[self.slots != NOWHERE].tolist()
        assert sorted([*taken, *self._free]) == list(range(self._num_slots)), "a slot below is lost or doubled"


class _Going(NamedTuple):
    """Rows of one lane on their way down; below `end` they are safe when the ticket is done."""

    ticket: Ticket
    lane: int
    end: int


@dataclass(slots=True)
class _Step:
    """The new tokens of the running step, by where their rows go. Indices point into the step's tokens."""

    home: Slots
    home_slots: NDArray[np.int32]
    """Int32[L, n]: device slots, other ones in every layer."""
    below: list[tuple[int, Slots, Slots]] = field(default_factory=list)
    """(tier, tokens, its slots): written past the device, as in the prefill of a prompt larger than the arena."""
    remnants: tuple[Slots, Slots] | None = None
    """(tokens, slots) whose layer inputs are kept."""
    lanes: tuple[int, ...] = ()
    """The lanes of the step's segments, in order."""
    owners: Lanes = field(default_factory=lambda: np.empty(0, np.int64))
    """Int64[n]: the lane of each token."""


class TieredStore:
    """A capped device arena over lower tiers.

    Args:
        num_layers: L.
        codec: writes and reads rows.
        num_rows: R, tokens of the device arena; each layer has as many slots.
        num_lanes: sequences that can be open at the same time.
        max_length: longest sequence, in tokens.
        tiers: lower tiers, nearest first; their row size is the codec's.
        remnants: where the layer inputs of deletable tokens lie; None: nothing can be deleted.
        rebuildable: first tokens of every sequence whose layer input is kept.
        eviction: who leaves the hot cache first.
        overlap: whether rows move beside the arithmetic.
        staging_rows: rows through which a selection larger than the arena is read; at least a piece.
        piece_columns: columns of the smallest piece that the decode kernel takes.
        device: where the arena lies; None: in main memory.
        append: writes rows in place; None: through the codec.
        make_shelves: how transfers reach the device's memory.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        codec: Codec,
        num_rows: int,
        num_lanes: int,
        max_length: int,
        tiers: Sequence[LowerTier],
        remnants: Remnants | None = None,
        rebuildable: int = 0,
        eviction: Eviction = "lru",
        overlap: bool = True,
        staging_rows: int = 512,
        piece_columns: int = 64,
        device: torch.device | None = None,
        append: AppendKernel | None = None,
        make_shelves: Callable[[Tensor], tuple[Shelf, ...]] = shelves,
    ) -> None:
        self.codec = codec
        self.num_lanes = num_lanes
        self.token_bytes = num_layers * codec.format.row_bytes
        self._num_layers = num_layers
        self.max_length = max_length
        self._tiers = tuple(tiers)
        self._tables = [_Table(tier.num_rows, num_lanes, max_length) for tier in tiers]
        self._append = append
        self._make_shelves = make_shelves
        self._remnants = remnants
        self._remnant_table = _Table(remnants.tier.num_rows if remnants else 0, num_lanes, max_length)
        self._rebuildable = rebuildable
        row_bytes = codec.format.row_bytes
        self._device = device or torch.device("cpu")
        # One allocation: a slot of a layer may point past the arena at a row of the buffers.
        self._num_rows = num_rows
        self._piece_columns = min(piece_columns, max_length)
        num_buffers = 2 if staging_rows >= 2 * self._piece_columns else 1
        buffer_rows = staging_rows // num_buffers
        assert buffer_rows >= self._piece_columns, f"{staging_rows} rows of staging are less than a piece"
        arena_rows = num_layers * num_rows
        self._pool = torch.empty(
            arena_rows + num_buffers * buffer_rows, row_bytes, dtype=torch.uint8, device=self._device
        )
        self._arena = make_shelves(self._pool[:arena_rows].view(num_layers, num_rows, row_bytes))
        self._staging = make_shelves(self._pool[arena_rows:].view(num_buffers, buffer_rows, row_bytes))
        self._residency = Residency(num_layers, num_rows, num_lanes, max_length, eviction)
        self._free_lanes = list(range(num_lanes - 1, -1, -1))
        self._open: dict[int, _Lane] = {}
        self._ends = np.zeros(num_lanes, np.int64)  # bounds[0] of every lane, for look-ups
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

    @property
    def has_free_lane(self) -> bool:
        """Whether another sequence can be opened."""
        return bool(self._free_lanes)

    def open(self, num_tokens: int) -> int:
        """See `RowStore.open`."""
        if num_tokens > self.max_length or not self._free_lanes:
            raise CapacityError(
                f"A sequence of {num_tokens} tokens is to be opened; a sequence may have {self.max_length}, and "
                f"{len(self._free_lanes)} of {self.num_lanes} lanes are free."
            )
        lane = self._free_lanes.pop()
        self._open[lane] = _Lane([0] * (len(self._tiers) + 1), min(self._rebuildable, num_tokens))
        self._ends[lane] = 0
        return lane

    def release(self, lane: int) -> None:
        """See `RowStore.release`; waits for transfers, whose slots are about to have another owner."""
        self._settle()
        state = self._open.pop(lane)
        self._residency.release(lane, state.length)
        for table in (*self._tables, self._remnant_table):
            table.give_back(lane, 0, self.max_length)
        self._free_lanes.append(lane)
        self._transfers.forgive(lane)

    def length(self, lane: int) -> int:
        """See `RowStore.length`."""
        return self._open[lane].length

    def bounds(self, lane: int) -> tuple[int, ...]:
        """See `RowStore.bounds`."""
        return tuple(self._open[lane].bounds)

    def rebuildable(self, lane: int) -> int:
        """See `RowStore.rebuildable`."""
        return self._open[lane].rebuildable

    # --- a step --------------------------------------------------------------------------------------------------

    def begin(self, plan: StepPlan) -> None:
        """See `RowStore.begin`."""
        for segment in plan.segments:
            length = self._open[segment.lane].length
            if segment.start != length or segment.end > self.max_length:
                raise CapacityError(
                    f"Lane {segment.lane} has {length} of at most {self.max_length} tokens; positions "
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
            self._open[segment.lane].length = segment.end

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor) -> None:
        """See `RowStore.append`."""
        step = self._step
        if len(step.home) == len(k) and self._append is not None:
            slots = torch.from_numpy(step.home_slots[layer]).to(self._device, torch.int64)
            self._append(self._arena[layer].rows, self.codec.format, slots, k, v)
        else:
            rows = self.codec.encode(k, v)
            self._arena[layer].put(step.home_slots[layer], rows[torch.from_numpy(step.home).to(self._device)])
            if step.below:
                below = rows.cpu().numpy()
                for tier, tokens, slots_below in step.below:
                    self._write_past(layer, self._tiers[tier], slots_below, below, tokens, step.owners[tokens])
        if step.remnants is not None and self._remnants is not None:
            tokens, slots_below = step.remnants
            remnants = self._remnants.encode(hidden[torch.from_numpy(tokens).to(self._device)])
            places = np.arange(len(tokens))
            self._write_past(layer, self._remnants.tier, slots_below, remnants, places, step.owners[tokens])

    def parts(self, layer: int, selection: Selection) -> Iterator[Part]:
        """See `RowStore.parts`; one set for all heads."""
        lanes, positions, real = _asked(self._step.lanes, selection)
        slots = self._residency.slots[layer][lanes[:, None], positions]
        below = real & (positions < self._ends[lanes][:, None])
        missing = real & (slots == NOWHERE)
        num_missing = int(missing.sum())
        self._count_hits(layer, slots[below])
        self._residency.touch(layer, slots[real & ~missing])
        self._arrive(layer)
        if num_missing:
            row, column = np.nonzero(missing)
            wanted, at = lanes[row], positions[row, column].astype(np.int64)
            placed = self._residency.place(layer, wanted, at)
            if placed is None and self._going:
                self._land(block=True)
                placed = self._residency.place(layer, wanted, at)
            if placed is None:
                yield from self._in_pieces(layer, lanes, positions, slots, real, missing)
                return
            slots[row, column] = placed
            self._transfers.wait(self._load(layer, wanted, at, self._arena[layer], placed))
        slots[~real] = 0
        yield Part(self._arena[layer].rows, torch.from_numpy(slots)[:, None].to(self._device), None)

    def prefetch(self, layer: int, lanes: tuple[int, ...], selection: Selection) -> None:
        """See `RowStore.prefetch`."""
        at_lanes, positions, real = _asked(lanes, selection)
        slots = self._residency.slots[layer][at_lanes[:, None], positions]
        # The newest token of the next step has no row yet: it is the last one of each sequence.
        known = real & (positions < np.array([self._open[lane].length for lane in lanes])[:, None])
        self._residency.touch(layer, slots[known & (slots != NOWHERE)], ahead=True)
        row, column = np.nonzero(known & (slots == NOWHERE))
        if not len(row):
            return
        wanted, at = at_lanes[row], positions[row, column].astype(np.int64)
        placed = self._residency.place(layer, wanted, at, ahead=True)
        if placed is not None:
            self._ahead[layer] = np.append(self._ahead[layer], placed)
            self._arriving[layer].append(self._load(layer, wanted, at, self._arena[layer], placed))

    def read(self, layer: int, lane: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """See `RowStore.read`."""
        positions = np.arange(start, end)
        slots = self._residency.slots[layer, lane, start:end]
        here, absent = np.flatnonzero(slots != NOWHERE), np.flatnonzero(slots == NOWHERE)
        self._arrive(layer)
        arena = self._arena[layer].rows
        present = arena.index_select(0, torch.from_numpy(slots[here]).to(self._device))
        if not len(absent):
            return self.codec.decode(present)
        [target] = self._make_shelves(arena.new_empty(1, end - start, arena.shape[1]))
        target.put(here, present)
        lanes = np.full(len(absent), lane)
        self._transfers.wait(self._load(layer, lanes, positions[absent], target, absent))
        return self.codec.decode(target.rows)

    # --- accounts ------------------------------------------------------------------------------------------------

    @property
    def used_rows(self) -> int:
        """Tokens whose rows exist somewhere."""
        return sum(lane.length - lane.bounds[-1] for lane in self._open.values())

    @property
    def deleted_tokens(self) -> int:
        """Tokens of open sequences whose rows are deleted."""
        return sum(lane.bounds[-1] for lane in self._open.values())

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
        assert sorted([*self._open, *self._free_lanes]) == list(range(self.num_lanes)), "a lane is lost or owned twice"
        for index, lane in self._open.items():
            edges = [lane.length, *lane.bounds]
            assert edges == sorted(edges, reverse=True), f"lane {index}: bounds {lane.bounds} cross"
            for level, table in enumerate(self._tables):
                held = np.flatnonzero(table.slots[index] != NOWHERE)
                expected = np.arange(lane.bounds[level + 1], lane.bounds[level])
                assert np.array_equal(held, expected), f"lane {index}: tier {level} holds {held}, not {expected}"
            home = self._residency.slots[:, index, lane.bounds[0] : lane.length]
            assert bool((home != NOWHERE).all()), f"lane {index}: a row that never left is not on the device"

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
        lane = self._open[move.lane]
        media = [Medium.DEVICE, *(tier.medium for tier in self._tiers), None]
        source, target = media.index(move.source), media.index(move.target)
        end = min(move.end, lane.length)
        if target <= len(self._tiers):
            slots = self._tables[target - 1].take(move.lane, move.start, move.end)[: end - move.start]
            if end > move.start:
                self._push(move.lane, move.start, end, source, target - 1, slots)
        else:
            assert move.end <= lane.rebuildable, f"positions up to {move.end} are deleted and cannot be rebuilt"
            self._counts["deleted"] += max(end - move.start, 0) * self._num_layers
        if source == 0:
            # In order behind what is on its way: rows that this step writes past the device, and deleted ones.
            self._going.append(_Going(Ticket(), move.lane, move.end))
        if source > 0:
            self._vacate(move)
            self._tables[source - 1].give_back(move.lane, move.start, move.end)
        for level in range(source, target):
            lane.bounds[level] = max(lane.bounds[level], move.end)
        self._ends[move.lane] = lane.bounds[0]

    def _vacate(self, move: Move) -> None:
        """Nothing is on its way to or from rows whose slots below are about to have another owner."""
        if self._residency.safe[move.lane] < move.end:
            self._land(block=True)
        self._flush()
        if (self._residency.slots[:, move.lane, move.start : move.end] != NOWHERE).any():
            self._arrive_everywhere()

    def _push(self, lane: int, start: int, end: int, source: int, tier: int, slots: Slots) -> None:
        """Copy rows [start, end) of all layers from a level to a lower tier, in the background."""
        count = end - start
        target = self._tiers[tier]
        self._counts["stored"] += count * self._num_layers
        self._counts["bytes"] += count * self.token_bytes
        if source == 0:
            from_slots = self._residency.slots[:, lane, start:end].astype(np.int64)
            fence = self._arena[0].fence()

            def down(some: Some) -> None:
                for layer, shelf in enumerate(self._arena):
                    shelf.give(partial(target.write, layer, slots[some]), from_slots[layer, some], fence)

            self._going.append(_Going(self._transfers.start(down, np.full(count, lane)), lane, end))
            return
        # From tier to tier: done at once, because the source's slots are about to be given away.
        self._settle()
        origin, old = self._tiers[source - 1], self._tables[source - 1].slots[lane, start:end].copy()

        def across(some: Some) -> None:
            buffer = np.empty((count, self.codec.format.row_bytes), np.uint8)
            rows = np.arange(count)[some]
            for layer in range(self._num_layers):
                origin.read(layer, old[some], buffer, rows)
                target.write(layer, slots[some], buffer, rows)

        self._transfers.wait(self._transfers.start(across, np.full(count, lane)))

    def _place(self, segments: Sequence[Segment]) -> None:
        """Decide for every new token where its rows go: device slots in each layer, or slots below."""
        lanes = np.concatenate([np.full(s.count, s.lane) for s in segments]) if segments else np.empty(0, np.int64)
        positions = np.concatenate([np.arange(s.start, s.end) for s in segments]) if segments else lanes
        home = np.flatnonzero(positions >= self._ends[lanes])
        home_slots = np.empty((self._num_layers, len(home)), np.int32)
        for layer in range(self._num_layers):
            placed = self._residency.place(layer, lanes[home], positions[home])
            if placed is None:
                self._land(block=True)
                self._arrive(layer)
                placed = self._residency.place(layer, lanes[home], positions[home], at_any_cost=True)
            if placed is None:
                raise CapacityError(f"{len(home)} new tokens have no room in the device arena of layer {layer}.")
            home_slots[layer] = placed
        step = _Step(home, home_slots, lanes=tuple(segment.lane for segment in segments), owners=lanes)
        for tier, table in enumerate(self._tables):
            slots = table.slots[lanes, positions]
            tokens = np.flatnonzero(slots != NOWHERE)
            if len(tokens):
                step.below.append((tier, tokens, slots[tokens]))
        kept = np.flatnonzero(positions < [self._open[lane].rebuildable for lane in lanes.tolist()])
        if len(kept):
            for segment in segments:
                end = min(segment.end, self._open[segment.lane].rebuildable)
                if end > segment.start:
                    self._remnant_table.take(segment.lane, segment.start, end)
            step.remnants = (kept, self._remnant_table.slots[lanes[kept], positions[kept]])
        self._step = step

    def _write_past(
        self, layer: int, tier: LowerTier, slots: Slots, source: Bytes, source_rows: Slots, lanes: Lanes
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

        self._written[layer].append(self._transfers.start(write, lanes))

    def _load(
        self, layer: int, lanes: NDArray[np.int64], positions: NDArray[np.int64], target: Shelf, places: Places
    ) -> Ticket:
        """Start to bring rows that are not on the device to these places of `target`."""
        for ticket in self._written[layer]:
            self._transfers.wait(ticket)
        self._written[layer].clear()
        ticket = Ticket()
        rest = np.ones(len(lanes), bool)
        for tier, table in zip(self._tiers, self._tables, strict=True):
            slots = table.slots[lanes, positions]
            found = np.flatnonzero(slots != NOWHERE)
            rest[found] = False
            for first in range(0, len(found), _JOB_ROWS):
                some = found[first : first + _JOB_ROWS]
                ticket.jobs += self._fetch(tier, layer, slots[some], target, places[some], lanes[some]).jobs
        self._counts["fetched"] += len(lanes) - int(rest.sum())
        self._counts["bytes"] += (len(lanes) - int(rest.sum())) * self.codec.format.row_bytes
        if rest.any():
            self._start_rebuild(ticket, layer, lanes[rest], positions[rest], target, places[rest])
        return ticket

    def _fetch(self, tier: LowerTier, layer: int, slots: Slots, target: Shelf, places: Places, lanes: Lanes) -> Ticket:
        fence = target.fence()

        def fetch(some: Some) -> None:
            target.receive(partial(tier.read, layer, slots[some]), places[some], fence)

        return self._transfers.start(fetch, lanes)

    def _start_rebuild(
        self,
        ticket: Ticket,
        layer: int,
        lanes: NDArray[np.int64],
        positions: NDArray[np.int64],
        target: Shelf,
        places: Places,
    ) -> None:
        """Fetch the remnants of deleted rows; whoever waits for the ticket makes the rows from them, in one product."""
        remnants = self._remnants
        assert remnants is not None, "rows are deleted only where remnants are kept"
        slots = self._remnant_table.slots[lanes, positions]
        buffer = HostShelf(torch.empty(len(slots), remnants.row_bytes, dtype=torch.uint8))
        ticket.jobs += self._fetch(remnants.tier, layer, slots, buffer, np.arange(len(slots)), lanes).jobs
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
        lanes: NDArray[np.int64],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        real: NDArray[np.bool_],
        missing: NDArray[np.bool_],
    ) -> Iterator[Part]:
        """The selection in its own order; what is not on the device comes through the buffers in turn.

        One buffer is read while the other fills. Pieces are cut at multiples of what the kernel sums up at once, so
        that the result is that of one part.
        """
        pieces = _cut_pieces(missing, real.sum(axis=1), self._piece_columns, len(self._staging[0].rows))
        num_buffers = len(self._staging)

        def fill(index: int) -> Ticket:
            buffer, piece = index % num_buffers, pieces[index]
            row, column = np.nonzero(missing & piece.holds(missing.shape[1]))
            places = np.arange(len(row))
            # Behind the layer's own rows come those of the layers after it, then the buffers.
            first = (self._num_layers - layer) * self._num_rows + buffer * len(self._staging[0].rows)
            slots[row, column] = first + places
            return self._load(layer, lanes[row], positions[row, column].astype(np.int64), self._staging[buffer], places)

        coming = fill(0)
        for index, piece in enumerate(pieces):
            self._transfers.wait(coming)
            if num_buffers > 1 and index + 1 < len(pieces):
                coming = fill(index + 1)
            yield Part(
                self._pool[layer * self._num_rows :],
                # A copy: the next pieces are still being placed.
                torch.from_numpy(np.where(piece.holds(slots.shape[1]), slots, 0))[:, None].to(self._device),
                Span(torch.from_numpy(piece.begins).to(self._device), torch.from_numpy(piece.ends).to(self._device)),
            )
            if num_buffers == 1 and index + 1 < len(pieces):
                coming = fill(index + 1)

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
            self._residency.safe[going.lane] = max(self._residency.safe[going.lane], going.end)

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


class _Piece(NamedTuple):
    """Columns begins[b] to ends[b] - 1 of each sequence, Int32[B]."""

    begins: NDArray[np.int32]
    ends: NDArray[np.int32]

    def holds(self, width: int) -> NDArray[np.bool_]:
        """Bool[B, width]: the columns of this piece."""
        columns = np.arange(width)
        return (columns >= self.begins[:, None]) & (columns < self.ends[:, None])


def _cut_pieces(missing: NDArray[np.bool_], counts: NDArray[np.int64], step: int, num_rows: int) -> list[_Piece]:
    """A selection cut at multiples of `step` columns, so that no piece lacks more than `num_rows` rows.

    Args:
        missing: Bool[B, K], the rows that a piece brings.
        counts: columns of each sequence.
        step: at most `num_rows`.
        num_rows: at least 1.
    """
    pieces: list[_Piece] = []
    begins, ends = np.zeros((2, len(counts)), np.int32)
    room = num_rows
    for sequence, count in enumerate(counts.tolist()):
        for first in range(0, count, step):
            needed = int(np.count_nonzero(missing[sequence, first : first + step]))
            if needed > room:
                pieces.append(_Piece(begins.copy(), ends.copy()))
                begins[:] = ends
                room = num_rows
            room -= needed
            ends[sequence] = min(first + step, count)
    return [*pieces, _Piece(begins, ends)]


def _asked(
    lanes: Sequence[int], selection: Selection
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Lanes [B], positions [B, K], and which of them are no padding."""
    positions = selection.positions[:, 0].cpu().numpy()
    real = np.arange(positions.shape[1]) < np.array(selection.num_tokens)[:, None]
    return np.array(lanes, np.int64), positions, real
