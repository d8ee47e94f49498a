"""Layers whose part of a decode step is one call: kept, chosen, attended to and completed by one kernel.

Where a model's layers are native too, all layers are one call together. Where it runs: the policy reads by a sketch of
keys and values, every row is on the device, and how many tokens a layer reads is known before it runs. Everywhere else
`KVSession` makes the single calls, which give the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from torch import Tensor

from alisa.attention.timing import StepSection, StepTimer
from alisa.cache.base import RowStore
from alisa.kernels.base import Selection
from alisa.kernels.sketch_step import BoundSketchSteps, LayerRows, RunningSketchStep, SketchStepKernel
from alisa.policy.base import PolicyState

if TYPE_CHECKING:
    from alisa.kernels import _native


class SketchedReader:
    """Runs the layers without a window of steps that go this way.

    Args:
        kernel: what runs them; None: no step goes this way.
        state: the policy's.
        store: of the rows.
        layers: numbers in the model of those layers.
        num_heads: H.
        timer: told where the time goes.
    """

    def __init__(
        self,
        kernel: SketchStepKernel | None,
        state: PolicyState,
        store: RowStore,
        layers: Sequence[int],
        num_heads: int,
        timer: StepTimer,
    ) -> None:
        self._kernel = kernel
        self._state = state
        self._store = store
        self._layers = layers
        self._num_heads = num_heads
        self._timer = timer
        self._bound: BoundSketchSteps | None = None
        self._running: list[RunningSketchStep] = []
        self._selections: list[Selection] = []
        self._step_of_layer: Sequence[int] = ()

    def begin(self, req_index: Tensor, positions: Tensor) -> bool:
        """Whether the step that the state has begun, new tokens at (req_index, positions), goes this way."""
        if self._kernel is None:
            return False
        sketched, rows = self._state.sketched(req_index, positions), self._store.device_rows()
        if sketched is None or rows is None or any(step.coverages is not None for step in sketched.steps):
            return False
        if self._bound is None:
            of_layers = zip(self._layers, sketched.keys, sketched.values, strict=True)
            bound = [LayerRows(rows.layers[layer], keys, values) for layer, keys, values in of_layers]
            self._bound = self._kernel.bind(bound, self._store.codec.format, self._num_heads)
        self._running = [self._bound.begin(rows.slots, ranking, sketched.ids) for ranking in sketched.rankings]
        chosen = zip(sketched.steps, self._running, strict=True)
        self._selections = [step.selection(running.positions) for step, running in chosen]
        self._step_of_layer = sketched.step_of_layer
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One of the policy's layers: `[B, 1, H, D]` as q; see `KVSession.attend`."""
        running = self._running[self._step_of_layer[layer]]
        start = perf_counter()
        out = running(layer, q, k, v)
        self._took(perf_counter() - start, running.choosing)
        self._state.on_chosen(layer, running.shares)
        return out

    @contextmanager
    def attend_all(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_native.LayerAttention]:
        """All of the policy's layers; see `AttendAll`."""
        assert self._bound is not None, "the step has begun"
        attention = self._bound.in_all_layers(self._running, self._step_of_layer, q, k, v)
        yield attention
        self._took(attention.seconds, attention.chose)
        last = len(self._step_of_layer) - 1
        self._state.on_chosen(last, self._running[self._step_of_layer[last]].shares)

    def selection(self, layer: int) -> Selection:
        """What the layer reads; its positions are those of whatever layer ran last."""
        return self._selections[self._step_of_layer[layer]]

    def _took(self, seconds: float, chose: float) -> None:
        self._timer.add(StepSection.SELECTION, seconds * chose)
        self._timer.add(StepSection.ATTENTION, seconds * (1 - chose))
