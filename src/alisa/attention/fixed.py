"""Decode steps that read the same tokens in every layer: dense attention, and patterns that look at positions alone.

Nothing is chosen between the layers, and where every row is on the device, all of them are one call; the same as layer
by layer, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from alisa.attention.timing import StepSection, StepTimer
from alisa.cache.base import RowStore
from alisa.kernels.base import Selection
from alisa.kernels.fixed_step import FixedSlots, FixedStepKernel

if TYPE_CHECKING:
    from alisa.kernels import _native


class FixedReader:
    """Runs all layers of such steps.

    Args:
        kernel: what runs them; None: no step goes this way.
        store: of the rows.
        softcap: of the logits, or None.
        timer: told where the time goes.
    """

    def __init__(
        self, kernel: FixedStepKernel | None, store: RowStore, softcap: float | None, timer: StepTimer
    ) -> None:
        self._kernel = kernel
        self._store = store
        self._softcap = softcap
        self._timer = timer
        self._selection: Selection | None = None

    def begin(self, selection: Selection | None) -> bool:
        """Whether a step goes this way whose layers all read this; None: it is not the same, or not known yet."""
        here = self._kernel is not None and selection is not None and self._store.device_rows() is not None
        self._selection = selection if here else None
        return here

    @contextmanager
    def attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_native.LayerAttention]:
        """All layers; see `AttendAll`."""
        selection, rows = self.selection(0), self._store.device_rows()
        assert self._kernel is not None, "see begin"
        assert rows is not None, "see begin"
        read = next(self._store.chunks(0, selection)).slots.contiguous()
        slots = FixedSlots(rows.slots.new, read, selection.counts, selection.entries)
        attention = self._kernel.in_all_layers(rows.layers, self._store.codec.format, slots, self._softcap, q, k, v)
        yield attention
        self._timer.add(StepSection.ATTENTION, attention.seconds)

    def selection(self, layer: int) -> Selection:
        """What the layer reads."""
        assert self._selection is not None, "see begin"
        return self._selection
