"""Rows on their way to the device: read from a tier, or made again from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from alisa.cache.offload.hidden import HiddenStateCache
from alisa.cache.offload.inflight import InFlightStores
from alisa.cache.offload.residency import Residency
from alisa.cache.offload.table import Level
from alisa.cache.offload.tiers import LowerTier, RowIndices
from alisa.cache.offload.traffic import TrafficMeter
from alisa.cache.offload.transfer import (
    JOB_ROWS,
    HostBuffer,
    Owners,
    RowSubset,
    TransferBuffer,
    TransferHandle,
    Transfers,
)
from alisa.cache.row_ids import NOWHERE, Ids, RowIds
from alisa.kernels.base import Codec, Slots


class _Prefetch(NamedTuple):
    """Rows of one layer that are brought for the next step, and the hidden states that this takes."""

    handle: TransferHandle
    hidden_bytes: int


class Loader:
    """Brings rows that are not on the device to it.

    Args:
        pool: the device's rows, layer by layer.
        codec: writes rows that are made again.
        row_ids: knows their positions.
        residency: where they go.
        levels: the lower tiers, nearest first.
        hidden: what deleted rows are made from; None: no row is ever deleted.
        in_flight: what is still being written cannot be read.
        transfers: does the work.
        meter: counts it.
        hidden_bytes: hidden states that are read for one layer take no more than this at a time (or one row), and those
            that are read ahead for all layers together no more than this.
    """

    def __init__(
        self,
        pool: tuple[TransferBuffer, ...],
        codec: Codec,
        row_ids: RowIds,
        residency: Residency,
        levels: Sequence[Level],
        hidden: HiddenStateCache | None,
        in_flight: InFlightStores,
        transfers: Transfers,
        meter: TrafficMeter,
        hidden_bytes: int,
    ) -> None:
        self._pool = pool
        self._codec = codec
        self._row_ids = row_ids
        self._residency = residency
        self._levels = levels
        self._hidden = hidden
        self._in_flight = in_flight
        self._transfers = transfers
        self._meter = meter
        self._hidden_bytes = hidden_bytes
        self._prefetches: list[list[_Prefetch]] = [[] for _ in pool]  # by layer
        self._prefetch_bytes = 0  # of hidden states
        self._ahead = [np.empty(0, np.int32) for _ in pool]  # slots that were filled for the next step

    def load(self, layer: int, ids: Ids, owners: Owners, target: TransferBuffer, indices: RowIndices) -> TransferHandle:
        """Start to bring rows that are not on the device to rows `indices` of `target`."""
        self._in_flight.wait_layer(layer)
        handle = TransferHandle()
        rest = np.ones(len(ids), bool)
        for tier, table in self._levels:
            slots = table.find(ids)
            found = np.flatnonzero(slots != NOWHERE)
            rest[found] = False
            for first in range(0, len(found), JOB_ROWS):
                some = found[first : first + JOB_ROWS]
                handle.add(self._fetch(tier, layer, slots[some], target, indices[some], owners[some]))
        deleted = np.flatnonzero(rest)
        self._meter.fetched(len(ids) - len(deleted), target.rows.shape[1])
        if len(deleted):
            self._start_rebuild(handle, layer, ids[deleted], owners[deleted], target, indices[deleted])
        return handle

    def load_now(self, layer: int, ids: Ids, owners: Owners, target: TransferBuffer, indices: RowIndices) -> None:
        """As `load`, and they are there."""
        self._transfers.wait(self.load(layer, ids, owners, target, indices))

    def wait(self, handle: TransferHandle) -> None:
        """The rows of this load are there."""
        self._transfers.wait(handle)

    def prefetch(self, layer: int, ids: Ids, owners: Owners) -> None:
        """Start to bring these rows to the device's pool for the next step, if they have room there."""
        num_bytes = self._hidden_bytes_of(ids)
        if self._prefetch_bytes + num_bytes > self._hidden_bytes:
            return
        slots = self._residency.place(layer, ids, ahead=True)
        if slots is None:
            return
        self._ahead[layer] = np.append(self._ahead[layer], slots)
        handle = self.load(layer, ids, owners, self._pool[layer], slots)
        self._prefetches[layer].append(_Prefetch(handle, num_bytes))
        self._prefetch_bytes += num_bytes

    def take_ahead(self, layer: int) -> RowIndices:
        """Slots that were filled for this step; asked for once."""
        slots, self._ahead[layer] = self._ahead[layer], np.empty(0, np.int32)
        return slots

    def forget(self, ids: Ids) -> None:
        """These rows are about to leave the device: what was filled for them ahead belongs to others."""
        for layer, ahead in enumerate(self._ahead):
            if len(ahead):
                self._ahead[layer] = np.setdiff1d(ahead, self._residency.slots[layer][ids])

    def wait_loads(self, layer: int) -> None:
        """Everything that was prefetched for this layer is there."""
        for prefetch in self._prefetches[layer]:
            self._finish(prefetch)
        self._prefetches[layer].clear()

    def wait_all_loads(self) -> None:
        """Everything that was prefetched is there."""
        for layer in range(len(self._prefetches)):
            self.wait_loads(layer)

    def wait_for(self, req_idx: int) -> None:
        """No row of this sequence is on its way to the device."""
        for layer, prefetches in enumerate(self._prefetches):
            for prefetch in prefetches:
                if prefetch.handle.concerns(req_idx):
                    self._finish(prefetch)
            self._prefetches[layer] = [prefetch for prefetch in prefetches if not prefetch.handle.concerns(req_idx)]

    def _finish(self, prefetch: _Prefetch) -> None:
        self._transfers.wait(prefetch.handle)
        self._prefetch_bytes -= prefetch.hidden_bytes

    def _hidden_bytes_of(self, ids: Ids) -> int:
        """What it takes to make those of these rows again that are deleted."""
        if self._hidden is None:
            return 0
        here = np.zeros(len(ids), bool)
        for level in self._levels:
            here |= level.table.find(ids) != NOWHERE
        return int(np.count_nonzero(~here)) * self._hidden.row_bytes

    def _fetch(
        self, tier: LowerTier, layer: int, slots: Slots, target: TransferBuffer, indices: RowIndices, owners: Owners
    ) -> TransferHandle:
        fence = target.fence()

        def fetch(subset: RowSubset) -> None:
            target.receive(partial(tier.read, layer, slots[subset]), indices[subset], fence)

        return self._transfers.start(fetch, owners)

    def _start_rebuild(
        self, handle: TransferHandle, layer: int, ids: Ids, owners: Owners, target: TransferBuffer, indices: RowIndices
    ) -> None:
        """Read the hidden states of deleted rows; whoever waits for the handle makes the last of them, in one product.

        If they are too many for one time, all others are made at once.
        """
        hidden = self._hidden
        assert hidden is not None, "rows are deleted only where hidden states are kept"
        self._meter.rebuilt(len(ids), hidden.row_bytes)
        size = max(1, self._hidden_bytes // hidden.row_bytes)
        for first in range(0, len(ids), size):
            piece = slice(first, first + size)
            part = self._rebuild(hidden, layer, ids[piece], owners[piece], target, indices[piece])
            if piece.stop < len(ids):
                self._transfers.wait(part)
            else:
                finish, part.finish = part.finish, None
                handle.add(part)
                handle.finish = finish

    def _rebuild(
        self,
        hidden: HiddenStateCache,
        layer: int,
        ids: Ids,
        owners: Owners,
        target: TransferBuffer,
        indices: RowIndices,
    ) -> TransferHandle:
        buffer = HostBuffer(torch.empty(len(ids), hidden.row_bytes, dtype=torch.uint8))
        slots, positions = hidden.table.find(ids), self._row_ids.positions(ids)
        handle = self._fetch(hidden.tier, layer, slots, buffer, np.arange(len(ids)), owners)

        def rebuild() -> None:
            encoded = buffer.rows.to(target.rows.device)
            target.put(indices, hidden.rows(layer, encoded, positions, self._codec))

        handle.finish = rebuild
        return handle
