"""The native kernels of a CPU: decode attention in one call or in pieces, and writing rows; with them, selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Codec
from alisa.kernels.checks import (
    check_append,
    check_decode,
    check_piece,
)
from alisa.kernels.fixed_step import FixedSlots
from alisa.kernels.native import library
from alisa.kernels.native.library import VALUE_CODES, dense_tokens
from alisa.kernels.native.selection import CpuSelection
from alisa.kernels.reference.entries import own_span
from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels._native import DecodeTask, FixedAttention, RowLayout, Workspace

# The numbers of `Dtype` in csrc/attend/task.h.
_ROW_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "k8v4": 5}


def check_slots(rows: Tensor, slots: Tensor, counts: Tensor) -> None:
    """Raise ValueError if a slot lies outside the pool, stands twice in one index set, or a count cannot be.

    The kernels trust their caller: this takes longer than attention itself and is for tests and debugging.
    """
    num_slots = slots.shape[2]
    if bool(((counts < 1) | (counts > num_slots)).any()):
        raise ValueError(f"counts {counts.tolist()} must lie between 1 and {num_slots}, the width of the slots")
    for seq, count in enumerate(counts.tolist()):
        for chosen in slots[seq, :, :count].tolist():
            if min(chosen) < 0 or max(chosen) >= len(rows):
                raise ValueError(
                    f"sequence {seq} reads slots {min(chosen)} to {max(chosen)} of a pool of {len(rows)} rows"
                )
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"sequence {seq} reads a slot twice: its weight would count twice")


class CpuKernels(CpuSelection):
    """The native kernels with their working memory; calling it is decode attention (see `DecodeKernel`).

    Args:
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses when a layer appends its rows.
        share_threads: run on torch's OpenMP threads where they can be found.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None, share_threads: bool = True) -> None:
        super().__init__(isa, num_threads=num_threads, share_threads=share_threads)
        self._last: tuple[RowFormat, RowLayout] | None = None
        self._attended: Attended | None = None

    def __call__(
        self,
        q: Tensor,
        rows: Tensor,
        codec: Codec,
        slots: Tensor,
        counts: Tensor,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> Attended:
        """Attend with q `[B, H, D]` to `slots` Int32[S, J, K] of `rows` UInt8[R, row_bytes]; see `DecodeKernel`.

        Counts Int32[B] are at least 1, slots valid and without duplicates within a set; `check_slots` says whether they
        are.
        """
        check_decode(q, rows, codec.format, slots, counts, entries)
        q, slots, counts = q.contiguous(), slots.contiguous(), counts.contiguous()
        mass = torch.empty(len(q), *slots.shape[1:])
        attended = Attended(torch.empty_like(q), mass, torch.empty(q.shape[:2]))
        task = decode_task(self._layout(codec.format), q, rows, slots, counts, attended, softcap, entries)
        self._workspace.decode(isa=self.isa, threads=self._threads, task=task)
        return attended

    def in_pieces(
        self,
        q: Tensor,
        codec: Codec,
        counts: Tensor,
        num_slots: int,
        softcap: float | None = None,
        entries: Tensor | None = None,
    ) -> CpuPieces:
        """See `DecodeKernel`: q `[B, H, D]`, counts Int32[B]."""
        layout, row_format = self._layout(codec.format), codec.format
        workspace = self._workspace
        return CpuPieces(self.isa, self._team, workspace, layout, row_format, q, counts, num_slots, softcap, entries)

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """See `DecodeKernel`."""
        return library.native().PIECE_COLUMNS

    def append(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's pool; nothing else is touched."""
        check_append(rows, row_format, slots, k, v)
        k, v, slots = dense_tokens(k), dense_tokens(v), slots.contiguous()
        self._threads = self._team.threads()  # once for all that a layer does
        self._workspace.encode(
            isa=self.isa,
            threads=self._threads,
            layout=self._layout(row_format),
            k=k.data_ptr(),
            v=v.data_ptr(),
            dtype=VALUE_CODES[k.dtype],
            k_stride=k.stride(0) * k.element_size(),
            v_stride=v.stride(0) * v.element_size(),
            rows=rows.data_ptr(),
            row_stride=rows.stride(0),
            slots=slots.data_ptr(),
            num_tokens=slots.shape[0],
        )

    def in_all_layers(
        self,
        layers: Sequence[Tensor],
        row_format: RowFormat,
        slots: FixedSlots,
        softcap: float | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> FixedAttention:
        """See `FixedStepKernel`: of all layers alike, so that the first one's check is everybody's."""
        query, rows, counts = q[:, 0], layers[0], slots.counts
        check_append(rows, row_format, slots.new, k[:, 0], v[:, 0])
        check_decode(query, rows, row_format, slots.read, counts, slots.entries)
        attended = Attended(torch.empty_like(query), torch.empty(0), torch.empty(query.shape[:2]))
        task = decode_task(self._layout(row_format), query, rows, slots.read, counts, attended, softcap, slots.entries)
        self._attended = attended  # native code has its address until the step is over
        return library.native().FixedAttention(
            workspace=self._workspace,
            isa=self.isa,
            attend=task,
            k=k.data_ptr(),
            v=v.data_ptr(),
            k_stride=k.stride(0) * k.element_size(),
            v_stride=v.stride(0) * v.element_size(),
            slots=slots.new.data_ptr(),
            num_tokens=len(slots.new),
            layers=[layer.data_ptr() for layer in layers],
        )

    def _layout(self, row_format: RowFormat) -> RowLayout:
        if self._last is None or self._last[0] is not row_format:
            self._last = row_format, row_layout(row_format)
        return self._last[1]


class CpuPieces:
    """See `AttentionPieces`; made by `CpuKernels.in_pieces`."""

    def __init__(
        self,
        isa: str,
        team: library.Team,
        workspace: Workspace,
        layout: RowLayout,
        row_format: RowFormat,
        q: Tensor,
        counts: Tensor,
        num_slots: int,
        softcap: float | None,
        entries: Tensor | None,
    ) -> None:
        self._softcap = softcap
        self._entries = entries
        self._isa = isa
        self._team = team
        self._workspace = workspace
        self._layout = layout
        self._format = row_format
        self._q = q.contiguous()
        self._counts = counts.contiguous()
        num_seqs, num_heads, _ = q.shape
        mass, log_sum_exp = torch.empty(num_seqs, 1, num_slots), torch.empty(num_seqs, num_heads)
        self._attended = Attended(torch.empty_like(self._q), mass, log_sum_exp)
        self._pieces = library.native().Pieces()

    def add(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor) -> None:
        """See `AttentionPieces`."""
        check_decode(self._q, rows, self._format, slots, self._counts, self._entries)
        check_piece(begins, ends, slots)
        begins, ends = own_span(begins, ends, self._counts, self._entries)
        slots, begins, ends = slots.contiguous(), begins.contiguous(), ends.contiguous()
        self._workspace.decode_piece(
            isa=self._isa,
            threads=self._team.threads(),
            task=self._task(rows, slots),
            pieces=self._pieces,
            begins=begins.data_ptr(),
            ends=ends.data_ptr(),
        )
        self._last = rows, slots

    def finish(self) -> Attended:
        """See `AttentionPieces`."""
        rows, slots = self._last
        self._workspace.decode_end(
            isa=self._isa,
            threads=self._team.threads(),
            task=self._task(rows, slots),
            pieces=self._pieces,
        )
        return self._attended

    def _task(self, rows: Tensor, slots: Tensor) -> DecodeTask:
        return decode_task(
            self._layout, self._q, rows, slots, self._counts, self._attended, self._softcap, self._entries
        )


def row_layout(row_format: RowFormat) -> RowLayout:
    """The format as native code has it."""
    shape = row_format.num_kv_heads, row_format.head_dim, row_format.num_parts
    layout = library.native().RowLayout(_ROW_DTYPES[row_format.dtype], *shape)
    assert layout.row_bytes == row_format.row_bytes, "RowFormat and RowLayout count bytes differently"
    return layout


def decode_task(
    layout: RowLayout,
    q: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    attended: Attended,
    softcap: float | None,
    entries: Tensor | None,
) -> DecodeTask:
    """Checked, contiguous tensors as addresses: they must live as long as it is used."""
    num_seqs, num_heads, _ = q.shape
    return library.native().DecodeTask(
        layout=layout,
        q=q.data_ptr(),
        q_dtype=VALUE_CODES[q.dtype],
        rows=rows.data_ptr(),
        row_stride=rows.stride(0),
        slots=slots.data_ptr(),
        entries=0 if entries is None else entries.data_ptr(),
        counts=counts.data_ptr(),
        num_seqs=num_seqs,
        num_heads=num_heads,
        num_sets=slots.shape[1],
        num_slots=slots.shape[2],
        out=attended.out.data_ptr(),
        mass=attended.mass.data_ptr(),  # 0 where it is empty: nobody asks
        log_sum_exp=attended.log_sum_exp.data_ptr(),
        softcap=softcap or 0.0,
    )
