"""Rows on their way down: copies of what the device holds, and rows that never lie there.

A row that is being copied stays on the device until the copy is complete; then it is safe and may leave. Rows of a
prompt that is larger than the pool, and hidden states, go straight to a tier: until they are written they take memory
of their own, which is bounded.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from alisa.cache.offload.residency import Residency
from alisa.cache.offload.table import Level
from alisa.cache.offload.tiers import LowerTier
from alisa.cache.offload.traffic import TrafficMeter
from alisa.cache.offload.transfer import JOB_ROWS, Owners, RowSubset, TransferBuffer, TransferHandle, Transfers
from alisa.cache.row_ids import Ids
from alisa.kernels.base import Slots


class InFlightStore(NamedTuple):
    """Rows of one sequence that are being copied down; they are safe when the handle is done."""

    handle: TransferHandle
    req_idx: int
    ids: Ids


class _Write(NamedTuple):
    """Rows that go straight to a tier, and the memory that they take until they are there."""

    handle: TransferHandle
    num_bytes: int


class InFlightStores:
    """Carries rows down in the background and knows which have arrived.

    Args:
        pool: the device's rows, layer by layer.
        residency: learns which rows are safe.
        transfers: does the work.
        meter: counts it.
        write_behind_bytes: rows that never lie on the device and are not written yet take no more than this.
    """

    def __init__(
        self,
        pool: tuple[TransferBuffer, ...],
        residency: Residency,
        transfers: Transfers,
        meter: TrafficMeter,
        write_behind_bytes: int,
    ) -> None:
        self._pool = pool
        self._residency = residency
        self._transfers = transfers
        self._meter = meter
        self._write_behind_bytes = write_behind_bytes
        self._stores: deque[InFlightStore] = deque()
        self._writes: list[list[_Write]] = [[] for _ in pool]  # by layer
        self._write_bytes = 0

    @property
    def any_stores(self) -> bool:
        """Whether rows of the device are being copied down."""
        return bool(self._stores)

    def start_store(self, req_idx: int, ids: Ids, target: LowerTier, slots: Slots) -> None:
        """Rows of all layers that are on the device are copied to a tier, in the background."""
        self._meter.stored(len(ids) * len(self._pool), self._pool[0].rows.shape[1])
        indices = [layer_slots[ids].astype(np.int64) for layer_slots in self._residency.slots]
        fence = self._pool[0].fence()

        def store(subset: RowSubset) -> None:
            for layer, buffer in enumerate(self._pool):
                buffer.give(partial(target.write, layer, slots[subset]), indices[layer][subset], fence)

        handle = self._transfers.start(store, np.full(len(ids), req_idx))
        self._stores.append(InFlightStore(handle, req_idx, ids))

    def move(self, req_idx: int, source: Level, ids: Ids, target: LowerTier, slots: Slots) -> None:
        """Rows of all layers are copied from tier to tier; it is done when this returns.

        The caller is about to give away their slots in the source.
        """
        row_bytes = self._pool[0].rows.shape[1]
        self._meter.stored(len(ids) * len(self._pool), row_bytes)
        self.wait_for(req_idx)
        old = source.table.find(ids)

        def move(subset: RowSubset) -> None:
            rows = np.arange(len(ids))[subset]
            buffer = np.empty((min(len(rows), JOB_ROWS), row_bytes), np.uint8)
            for layer in range(len(self._pool)):
                for first in range(0, len(rows), JOB_ROWS):
                    some = rows[first : first + JOB_ROWS]
                    source.tier.read(layer, old[some], buffer, np.arange(len(some)))
                    target.write(layer, slots[some], buffer, np.arange(len(some)))

        self._transfers.wait(self._transfers.start(move, np.full(len(ids), req_idx)))

    def write(self, layer: int, tier: LowerTier, slots: Slots, rows: Tensor, owners: Owners) -> None:
        """Rows UInt8[N, row_bytes] of one layer go straight to a tier, after others if too many are on their way."""
        source = rows.cpu().numpy()
        self._meter.stored(len(slots), source.shape[1])
        if self._write_bytes + source.nbytes > self._write_behind_bytes:
            self.wait_writes()
        indices = np.arange(len(slots))

        def write(subset: RowSubset) -> None:
            tier.write(layer, slots[subset], source, indices[subset])

        self._writes[layer].append(_Write(self._transfers.start(write, owners), source.nbytes))
        self._write_bytes += source.nbytes
        if source.nbytes > self._write_behind_bytes:
            self.wait_layer(layer)

    def poll_stores(self) -> None:
        """Rows that have reached the tier below may leave the device."""
        while self._stores and self._stores[0].handle.is_done:
            self._complete(self._stores.popleft())

    def wait_stores(self) -> None:
        """All rows that were being copied down have reached the tier below and may leave the device."""
        while self._stores:
            self._complete(self._stores.popleft())

    def wait_layer(self, layer: int) -> None:
        """Everything of this layer that goes straight to a tier is there."""
        for write in self._writes[layer]:
            self._finish(write)
        self._writes[layer].clear()

    def wait_writes(self) -> None:
        """Everything that goes straight to a tier is there."""
        for layer in range(len(self._writes)):
            self.wait_layer(layer)

    def wait_for(self, req_idx: int) -> None:
        """No row of this sequence is on its way down."""
        self._wait_stores_of(req_idx)
        self._wait_writes_of(req_idx)

    def before_free(self, req_idx: int, ids: Ids) -> None:
        """These rows of a sequence are not on their way down: their slots below are about to have another owner."""
        if not self._residency.safe[ids].all():
            self._wait_stores_of(req_idx)
        self._wait_writes_of(req_idx)

    def drain(self) -> None:
        """Nothing is on its way down."""
        self.wait_stores()
        self.wait_writes()

    def _wait_stores_of(self, req_idx: int) -> None:
        for store in self._stores:
            if store.req_idx == req_idx:
                self._complete(store)
        self._stores = deque(store for store in self._stores if store.req_idx != req_idx)

    def _wait_writes_of(self, req_idx: int) -> None:
        for layer, writes in enumerate(self._writes):
            for write in writes:
                if write.handle.concerns(req_idx):
                    self._finish(write)
            self._writes[layer] = [write for write in writes if not write.handle.concerns(req_idx)]

    def _complete(self, store: InFlightStore) -> None:
        self._transfers.wait(store.handle)
        self._residency.safe[store.ids] = True

    def _finish(self, write: _Write) -> None:
        self._transfers.wait(write.handle)
        self._write_bytes -= write.num_bytes
