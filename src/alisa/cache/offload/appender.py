"""Where the rows of a step's new tokens go: slots of the device pool in every layer, or slots below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alisa.cache.offload.hidden import HiddenStateCache
from alisa.cache.offload.inflight import InFlightStores
from alisa.cache.offload.loader import Loader
from alisa.cache.offload.residency import Residency
from alisa.cache.offload.table import Level
from alisa.cache.offload.tiers import LowerTier
from alisa.cache.offload.transfer import Owners, TransferBuffer
from alisa.cache.row_ids import NOWHERE, RowIds
from alisa.errors import CapacityError
from alisa.kernels.base import AppendKernel, Codec, Slots
from alisa.scheduler.plan import ScheduledChunk


@dataclass(slots=True)
class _Step:
    """The new tokens of the running step, by where their rows go. Indices point into the step's tokens."""

    home: Slots
    home_slots: NDArray[np.int32]
    """Int32[L, n]: device slots, other ones in every layer."""
    below: list[tuple[LowerTier, Slots, Slots]] = field(default_factory=list)
    """(tier, tokens, its slots): written past the device, as in the prefill of a prompt larger than the pool."""
    hidden: tuple[Slots, Slots] | None = None
    """(tokens, slots) whose hidden states are kept."""
    owners: Owners = field(default_factory=lambda: np.empty(0, np.int64))
    """Int64[n]: the request index of each token."""


class Appender:
    """Gives every new token its place when a step begins, and writes its rows layer by layer.

    Args:
        pool: device rows of each layer.
        codec: makes rows where `kernel` does not.
        kernel: writes rows in place; None: through the codec.
        row_ids: of all open sequences.
        residency: what lies on the device.
        levels: the lower tiers with their tables.
        hidden: takes the layer inputs of deletable tokens; None: nothing can be deleted.
        loader: waited for where the device has no room.
        in_flight: carries rows past the device.
        device: where the pool lies.
    """

    def __init__(
        self,
        pool: Sequence[TransferBuffer],
        codec: Codec,
        kernel: AppendKernel | None,
        row_ids: RowIds,
        residency: Residency,
        levels: Sequence[Level],
        hidden: HiddenStateCache | None,
        loader: Loader,
        in_flight: InFlightStores,
        device: torch.device,
    ) -> None:
        self._pool = pool
        self._codec = codec
        self._kernel = kernel
        self._row_ids = row_ids
        self._residency = residency
        self._levels = levels
        self._hidden = hidden
        self._loader = loader
        self._in_flight = in_flight
        self._device = device
        self._step = _Step(np.empty(0, np.int64), np.empty((len(pool), 0), np.int32))

    def begin(self, chunks: Sequence[ScheduledChunk], ends: NDArray[np.int64], rebuildable: Sequence[int]) -> None:
        """Every new token has its places.

        Args:
            chunks: of the step.
            ends: Int64[max_num_seqs]: positions below this lie in lower tiers.
            rebuildable: of each chunk's sequence, positions that keep a hidden state.

        Raises:
            CapacityError: the device has no room.
        """
        counts = [chunk.count for chunk in chunks]
        owners = np.repeat(np.array([chunk.req_idx for chunk in chunks], np.int64), counts)
        positions = np.concatenate([np.empty(0, np.int64), *(np.arange(s.start, s.end) for s in chunks)])
        ids = self._row_ids.lookup(owners, positions)
        home = np.flatnonzero(positions >= ends[owners])
        step = _Step(home, self._device_slots(ids[home]), owners=owners)
        for tier, table in self._levels:
            slots = table.find(ids)
            tokens = np.flatnonzero(slots != NOWHERE)
            if len(tokens):
                step.below.append((tier, tokens, slots[tokens]))
        if self._hidden is not None:
            kept = np.flatnonzero(positions < np.repeat(rebuildable, counts))
            if len(kept):
                step.hidden = (kept, self._hidden.table.take(ids[kept]))
        self._step = step

    def append(self, layer: int, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """See `RowStore.append`."""
        step = self._step
        if len(step.home) == len(k) and self._kernel is not None:
            slots = torch.from_numpy(step.home_slots[layer]).to(self._device, torch.int64)
            self._kernel(self._pool[layer].rows, self._codec.format, slots, k, v)
        else:
            self.put(layer, self._codec.encode(k, v))
        if step.hidden is not None and self._hidden is not None:
            assert hidden is not None, "what may be deleted is rebuilt from the layer input"
            tokens, slots_below = step.hidden
            encoded = self._hidden.encode(hidden[self._index(tokens)])
            self._in_flight.write(layer, self._hidden.tier, slots_below, encoded, step.owners[tokens])

    def put(self, layer: int, rows: Tensor) -> None:
        """The new tokens' rows UInt8[N, row_bytes] of one layer are where they belong."""
        step = self._step
        self._pool[layer].put(step.home_slots[layer], rows[self._index(step.home)])
        for tier, tokens, slots_below in step.below:
            below = rows[self._index(tokens)]
            self._in_flight.write(layer, tier, slots_below, below, step.owners[tokens])

    def _device_slots(self, ids: Slots) -> NDArray[np.int32]:
        """Int32[L, n]: a slot in every layer for each of these rows."""
        slots = np.empty((len(self._pool), len(ids)), np.int32)
        for layer in range(len(self._pool)):
            placed = self._residency.place(layer, ids)
            if placed is None:
                self._in_flight.wait_stores()
                self._loader.wait_loads(layer)
                placed = self._residency.place(layer, ids, at_any_cost=True)
            if placed is None:
                raise CapacityError(f"{len(ids)} new tokens have no room in the device pool of layer {layer}.")
            slots[layer] = placed
        return slots

    def _index(self, indices: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(indices).to(self._device)
