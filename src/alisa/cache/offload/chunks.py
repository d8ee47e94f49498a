"""Rows for those who read: a selection, in pieces when it is larger than the pool, or a range of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.base import KVChunk, Span
from alisa.cache.offload.inflight import InFlightStores
from alisa.cache.offload.loader import Loader
from alisa.cache.offload.pieces import cut_pieces
from alisa.cache.offload.residency import Residency
from alisa.cache.offload.traffic import TrafficMeter
from alisa.cache.offload.transfer import TransferBuffer, TransferHandle
from alisa.cache.row_ids import NOWHERE, Ids, RowIds
from alisa.kernels.base import Selection


class _Request(NamedTuple):
    """A selection, looked up: what holds for every layer that asks for it."""

    selection: Selection
    owners: NDArray[np.int64]
    """Int64[S]: whose rows each entry selects."""
    ids: Ids
    """Int64[S, K]."""
    real: NDArray[np.bool_]
    """Bool[S, K]: no padding."""
    below: NDArray[np.bool_]
    """Bool[S, K]: the row has left the device's own part."""


class ChunkReader:
    """Finds the rows of a selection, and brings those that are missing.

    Args:
        memory: UInt8[L * R + staging, row_bytes]: the device's rows layer by layer, then the staging buffers, so that a
            slot of any layer may point at them.
        pool: the rows of each layer, for transfers.
        staging: one or two buffers through which a selection larger than the pool is read; none smaller than a piece.
        piece_columns: columns of the smallest piece that the decode kernel takes.
        row_ids: numbers the rows.
        residency: which of them are on the device.
        loader: brings the others.
        in_flight: rows that may leave soon.
        meter: counts look-ups.
        device: where a kernel wants its indices.
        make_buffers: how transfers reach the device's memory.
    """

    def __init__(
        self,
        memory: Tensor,
        pool: tuple[TransferBuffer, ...],
        staging: tuple[TransferBuffer, ...],
        piece_columns: int,
        row_ids: RowIds,
        residency: Residency,
        loader: Loader,
        in_flight: InFlightStores,
        meter: TrafficMeter,
        device: torch.device,
        make_buffers: Callable[[Tensor], tuple[TransferBuffer, ...]],
    ) -> None:
        self._memory = memory
        self._pool = pool
        self._staging = staging
        self._piece_columns = piece_columns
        self._row_ids = row_ids
        self._residency = residency
        self._loader = loader
        self._in_flight = in_flight
        self._meter = meter
        self._device = device
        self._make_buffers = make_buffers
        self._req_indices = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._last: _Request | None = None

    def begin(self, req_indices: NDArray[np.int64], ends: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """The next selections are of these sequences, each of which has so many new tokens.

        Those positions of each sequence that are below its end have gone down.
        """
        self._req_indices = req_indices
        self._ends = ends
        self._counts = counts
        self._last = None

    def chunks(self, layer: int, selection: Selection) -> Iterator[KVChunk]:
        """See `RowStore.chunks`; one set for all heads."""
        request = self._look_up(selection)
        slots = self._residency.slots[layer].take(request.ids)
        missing = request.real & (slots == NOWHERE)
        self._count_hits(layer, slots[request.below])
        self._residency.touch(layer, slots[request.real & ~missing])
        self._loader.wait_loads(layer)
        if missing.any():
            row, column = np.nonzero(missing)
            ids = request.ids[row, column]
            first = place = slice(None)
            # Several tokens of a sequence may have chosen the same row.
            if len(request.owners) > len(self._req_indices):
                ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
            placed = self._residency.place(layer, ids)
            if placed is None and self._in_flight.any_stores:
                self._in_flight.wait_stores()
                placed = self._residency.place(layer, ids)
            if placed is None:
                yield from self._in_pieces(layer, request, slots, missing)
                return
            slots[row, column] = placed[place]
            self._loader.load_now(layer, ids, request.owners[row[first]], self._pool[layer], placed)
        slots[~request.real] = 0
        yield KVChunk(self._pool[layer].rows, torch.from_numpy(slots)[:, None].to(self._device), None)

    def prefetch(
        self, layer: int, req_indices: NDArray[np.int64], lengths: NDArray[np.int64], selection: Selection
    ) -> None:
        """See `RowStore.prefetch`; the sequences have these lengths."""
        positions, real = _positions(selection)
        # The newest token of the next step has no row yet: it is the last one of each sequence.
        row, column = np.nonzero(real & (positions < lengths[:, None]))
        owners = req_indices[row]
        ids = self._row_ids.lookup(owners, positions[row, column])
        slots = self._residency.slots[layer][ids]
        missing = slots == NOWHERE
        self._residency.touch(layer, slots[~missing], ahead=True)
        if missing.any():
            self._loader.prefetch(layer, ids[missing], owners[missing])

    def read(self, layer: int, req_idx: int, start: int, end: int) -> Tensor:
        """Rows UInt8[end - start, row_bytes] of these positions of a sequence, wherever they lie."""
        ids = self._row_ids.of(req_idx, start, end)
        slots = self._residency.slots[layer][ids]
        here, absent = np.flatnonzero(slots != NOWHERE), np.flatnonzero(slots == NOWHERE)
        self._loader.wait_loads(layer)
        pool = self._pool[layer].rows
        present = pool.index_select(0, torch.from_numpy(slots[here]).to(self._device))
        if not len(absent):
            return present
        [target] = self._make_buffers(pool.new_empty(1, end - start, pool.shape[1]))
        target.put(here, present)
        self._loader.load_now(layer, ids[absent], np.full(len(absent), req_idx), target, absent)
        return target.rows

    def _look_up(self, selection: Selection) -> _Request:
        # Dense attention and fixed patterns choose once for all layers.
        if self._last is None or self._last.selection is not selection:
            positions, real = _positions(selection)
            owners, ends = self._req_indices, self._ends
            if selection.entries is None:  # a selection of its own for each token
                owners, ends = owners.repeat(self._counts), ends.repeat(self._counts)
            below = real & (positions < ends[:, None])
            ids = self._row_ids.lookup(owners[:, None], positions)
            self._last = _Request(selection, owners, ids, real, below)
        return self._last

    def _count_hits(self, layer: int, slots: NDArray[np.int32]) -> None:
        """Take note of look-ups of rows that have gone down. A row that was prefetched for this step is not a hit."""
        brought = int(np.count_nonzero(slots == NOWHERE))
        ahead = self._loader.take_ahead(layer)
        if len(ahead):
            brought += int(np.count_nonzero(np.isin(slots, ahead)))
        self._meter.lookups += len(slots)
        self._meter.hits += len(slots) - brought

    def _in_pieces(
        self, layer: int, request: _Request, slots: NDArray[np.int32], missing: NDArray[np.bool_]
    ) -> Iterator[KVChunk]:
        """The selection in its own order; what is not on the device comes through the buffers in turn.

        With two buffers, one is read while the other fills. Pieces are cut at multiples of what the kernel sums up at
        once, so that the result is that of one chunk.
        """
        buffer_rows, num_buffers = len(self._staging[0].rows), len(self._staging)
        pieces = cut_pieces(missing, request.real.sum(axis=1), self._piece_columns, buffer_rows)
        num_rows = len(self._pool[0].rows)

        def fill(index: int) -> TransferHandle:
            buffer = index % num_buffers
            row, column = np.nonzero(missing & pieces[index].holds(missing.shape[1]))
            indices = np.arange(len(row))
            # After the layer's own rows come those of the layers after it, then the buffers.
            slots[row, column] = (len(self._pool) - layer) * num_rows + buffer * buffer_rows + indices
            ids, owners = request.ids[row, column], request.owners[row]
            return self._loader.load(layer, ids, owners, self._staging[buffer], indices)

        coming = fill(0)
        for index, piece in enumerate(pieces):
            self._loader.wait(coming)
            if num_buffers > 1 and index + 1 < len(pieces):
                coming = fill(index + 1)
            # A copy: the next piece is being placed already.
            here = np.where(piece.holds(slots.shape[1]), slots, 0)[:, None]
            span = Span(torch.from_numpy(piece.begins).to(self._device), torch.from_numpy(piece.ends).to(self._device))
            yield KVChunk(self._memory[layer * num_rows :], torch.from_numpy(here).to(self._device), span)
            if num_buffers == 1 and index + 1 < len(pieces):
                coming = fill(index + 1)


def _positions(selection: Selection) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Positions [S, K], and which of them are no padding: some query reads them."""
    positions = selection.positions[:, 0].cpu().numpy()
    counts = np.array(selection.num_tokens)
    if selection.entries is not None:
        most = np.zeros(len(positions), np.int64)
        np.maximum.at(most, selection.entries.cpu().numpy(), counts)
        counts = most
    return positions, np.arange(positions.shape[1]) < counts[:, None]
