"""A layer of a decode step that reads by a sketch, as one native call; see `alisa.kernels.sketch_step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Ranking
from alisa.kernels.checks import (
    check_append,
    check_decode,
    check_ranking,
    check_sketch_append,
    check_sketch_values,
    check_step_slots,
)
from alisa.kernels.native import library
from alisa.kernels.native.kernels import decode_task, row_layout
from alisa.kernels.native.selection import sketch_task
from alisa.kernels.sketch_step import LayerRows, RunningSketchStep, StepSlots
from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels import _native


class CpuSketchStep:
    """See `SketchStepKernel`; with its working memory, which grows with the longest step.

    Args:
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses when a step begins.
        share_threads: run on torch's OpenMP threads where they can be found.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None, share_threads: bool = True) -> None:
        self.isa = isa or library.isa_names()[0]
        self._team = library.Team(num_threads, share=share_threads)
        self._stepper = library.native().SketchStepper()

    def bind(self, layers: Sequence[LayerRows], row_format: RowFormat, num_heads: int) -> CpuSketchSteps:
        """See `SketchStepKernel`."""
        return CpuSketchSteps(self.isa, self._team, self._stepper, layers, row_format, num_heads)


class CpuSketchSteps:
    """See `BoundSketchSteps`; made by `CpuSketchStep.bind`."""

    def __init__(
        self,
        isa: str,
        team: library.Team,
        stepper: _native.SketchStepper,
        layers: Sequence[LayerRows],
        row_format: RowFormat,
        num_heads: int,
    ) -> None:
        self.isa = isa
        self.stepper = stepper
        self.layers = layers
        self.row_format = row_format
        self.num_heads = num_heads
        self.addresses = [_addresses(layer) for layer in layers]
        self._team = team

    def begin(self, slots: StepSlots, ranking: Ranking, ids: Tensor) -> CpuRunningStep:
        """See `BoundSketchSteps`."""
        assert ranking.coverages is None, "how many tokens a layer reads is known before it runs"
        return CpuRunningStep(self, self._team.threads(), slots, ranking, ids)

    def in_all_layers(
        self, running: Sequence[RunningSketchStep], of_layer: Sequence[int], q: Tensor, k: Tensor, v: Tensor
    ) -> _native.SketchAttention:
        """See `BoundSketchSteps`."""
        steps = [step.native(q, k, v) for step in running]
        return library.native().SketchAttention(
            stepper=self.stepper,
            steps=[steps[number] for number in of_layer],
            places=self.addresses,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            k_stride=k.stride(0) * k.element_size(),
            v_stride=v.stride(0) * v.element_size(),
        )


class CpuRunningStep:
    """See `RunningSketchStep`; made by `CpuSketchSteps.begin`. What it writes is allocated once for all layers."""

    def __init__(
        self, steps: CpuSketchSteps, threads: _native.Threads, slots: StepSlots, ranking: Ranking, ids: Tensor
    ) -> None:
        num_seqs, num_sets = len(ranking.lengths), ranking.num_sets
        self.positions = torch.zeros(num_seqs * num_sets, ranking.num_slots, dtype=torch.int32)
        self.shares = torch.empty(num_seqs, steps.num_heads)
        self._steps, self._threads, self._run = steps, threads, steps.stepper.run
        self._slots = slots._replace(new=slots.new.contiguous())
        self._ranking = ranking._replace(starts=ranking.starts.contiguous(), lengths=ranking.lengths.contiguous())
        self._ids = ids.contiguous()
        self.choosing = 0.0
        self._step: _native.SketchStep | None = None
        self._asked = (torch.Size(), torch.Size(), torch.float32)
        self._out = torch.empty(0)
        self._buffers: tuple[Tensor, ...] = ()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `RunningSketchStep`."""
        q, k, v = q.contiguous(), _dense(k), _dense(v)
        self.choosing = self._run(
            self._threads,
            self.native(q, k, v),
            self._steps.addresses[layer],
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0) * k.element_size(),
            v.stride(0) * v.element_size(),
        )
        return self._out

    def native(self, q: Tensor, k: Tensor, v: Tensor) -> _native.SketchStep:
        """See `RunningSketchStep`."""
        if self._step is None:
            self._step = self._begin(q, k, v)
        elif (q.shape, k.shape, q.dtype) != self._asked or v.shape != k.shape or not k.dtype == v.dtype == q.dtype:
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not as in other layers"
            )
        return self._step

    def _begin(self, q: Tensor, k: Tensor, v: Tensor) -> _native.SketchStep:
        """What all layers share: the first of them is checked, and the others are made as it is."""
        steps, ranking, places = self._steps, self._ranking, self._slots
        rows, keys, values = steps.layers[0]
        query = q[:, 0]
        counts = ranking.counts[:: ranking.num_sets].contiguous()
        slots = torch.zeros(len(q), ranking.num_sets, ranking.num_slots, dtype=torch.int32)
        check_append(rows, steps.row_format, places.new, k[:, 0], v[:, 0])
        check_sketch_append(keys, self._ids, k[:, 0])
        check_sketch_append(values, self._ids, v[:, 0])
        check_ranking(query, keys, ranking)
        check_sketch_values(query, keys, values)
        check_decode(query, rows, steps.row_format, slots, counts)
        check_step_slots(places, len(q))
        if k.dtype != q.dtype or steps.num_heads != q.shape[2]:
            raise TypeError(f"q has {steps.num_heads} heads of the dtype of k, not {q.shape[2]} in {q.dtype}")
        self._asked = q.shape, k.shape, q.dtype
        self._out = torch.empty_like(q)
        attended = Attended(torch.empty_like(q), torch.empty(0), torch.empty(q.shape[0], q.shape[2]))
        rest = torch.empty(query.shape)
        self._buffers = (slots, counts, rest, attended.out, attended.log_sum_exp)
        return library.native().SketchStep(
            isa=steps.isa,
            sketch=sketch_task(
                query,
                keys,
                ranking.starts,
                ranking.lengths,
                ranking.width,
                ranking.num_sets,
                ranking.softcap,
                (values, rest),
            ),
            attend=decode_task(
                row_layout(steps.row_format), query, rows, slots, counts, attended, ranking.softcap, None
            ),
            older_ends=ranking.older_ends.data_ptr(),
            older_counts=ranking.older_counts.data_ptr(),
            row_counts=ranking.counts.data_ptr(),
            positions=self.positions.data_ptr(),
            slots=slots.data_ptr(),
            new_slots=places.new.data_ptr(),
            new_ids=self._ids.data_ptr(),
            table=places.table.data_ptr(),
            table_stride=places.table.stride(0),
            table_rows=0 if places.table_rows is None else places.table_rows.data_ptr(),
            shares=self.shares.data_ptr(),
            out=self._out.data_ptr(),
        )


def _dense(values: Tensor) -> Tensor:
    """`[B, 1, G, D]` with each token's values in one run; a copy only where they are not."""
    return values if values.stride()[2:] == (values.shape[3], 1) else values.contiguous()


def _addresses(layer: LayerRows) -> _native.SketchLayer:
    keys, values = layer.keys, layer.values
    return library.native().SketchLayer(
        layer.rows.data_ptr(),
        keys.codes.data_ptr(),
        keys.ranges.data_ptr(),
        values.codes.data_ptr(),
        values.ranges.data_ptr(),
    )
