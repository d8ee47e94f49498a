"""The native CPU kernels, as functions of tensors.

The library is optional (no compiler, no library) and knows nothing of torch: this file checks dtypes, shapes and
strides, allocates the results and hands over addresses. It also hands over torch's own OpenMP runtime, so that both
share one pool of threads.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info
from torch import Tensor

from alisa.kernels.base import Attended, Codec, Completed, Sketch
from alisa.kernels.checks import (
    check_append,
    check_decode,
    check_mean_add,
    check_mean_blend,
    check_observe,
    check_piece,
    check_rest_blend,
    check_select,
    check_sketch_append,
    check_sketch_scores,
    check_sketch_select,
    check_sketch_values,
)
from alisa.spec import RowFormat

if TYPE_CHECKING:
    from alisa.kernels._native import DecodeTask, RowLayout, SketchTask, Threads, Workspace

try:
    from alisa.kernels import _native
except ImportError as error:
    _native = None
    _MISSING = f"the native kernels are not installed ({error}); they are built when a C++ compiler is present"
else:
    _MISSING = ""

# The numbers of `Dtype` in native/task.h.
_ROW_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4}
VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of `Dtype` in native/task.h, of inputs and outputs."""


def available() -> bool:
    """Whether the native library can be used."""
    return _native is not None


def unavailable_reason() -> str:
    """Why not, in one sentence; empty where it can."""
    return _MISSING


def isa_names() -> tuple[str, ...]:
    """Instruction sets that this build and this CPU have in common, fastest first; empty without the library."""
    return tuple(_native.isa_names()) if _native is not None else ()


@cache
def openmp_entry() -> int:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch has loaded; 0 where there is none that has it."""
    for pool in threadpool_info():
        if pool["user_api"] != "openmp":
            continue
        entry = getattr(ctypes.CDLL(pool["filepath"]), "GOMP_parallel", None)
        if entry is not None:
            return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


def move_rows(
    file: int,
    offsets: NDArray[np.int64],
    memory: NDArray[np.uint8],
    rows: NDArray[np.int64],
    *,
    write: bool,
) -> int:
    """Bytes moved between rows of `memory` (UInt8[N, row_bytes]) and a file, at ascending offsets (Int64[n]).

    Rows that lie next to each other in the file go in one system call; the interpreter is not held meanwhile.

    Raises:
        OSError: the system refused.
    """
    moved = library().move_rows(
        write=write,
        file=file,
        offsets=offsets.ctypes.data,
        memory=memory.ctypes.data,
        stride=memory.strides[0],
        rows=rows.ctypes.data,
        count=len(rows),
        row_bytes=memory.shape[1],
    )
    if moved < 0:
        raise OSError(-moved, os.strerror(-moved))
    return moved


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


class Team:
    """The threads that native calls run on.

    Args:
        num_threads: how many; None: as many as torch uses at the time of the call.
        share: on torch's OpenMP threads where they can be found.
    """

    __slots__ = ("_entry", "_make", "_num_threads")

    def __init__(self, num_threads: int | None = None, *, share: bool = True) -> None:
        self._make = library().Threads
        self._num_threads = num_threads
        self._entry = openmp_entry() if share else 0

    def threads(self) -> Threads:
        """The team of one call."""
        return self._make(self._entry, self._num_threads or torch.get_num_threads())


class CpuKernels:
    """The native kernels with their working memory; calling it is decode attention (see `DecodeKernel`).

    Args:
        isa: one of `isa_names()`; by default the fastest.
        num_threads: threads to use; by default as many as torch uses when a layer appends its rows.
        share_threads: run on torch's OpenMP threads where they can be found.
    """

    def __init__(self, isa: str | None = None, *, num_threads: int | None = None, share_threads: bool = True) -> None:
        if _native is None:
            raise RuntimeError(_MISSING)
        if isa is not None and isa not in isa_names():
            raise ValueError(f"{isa} kernels cannot run here; there are {', '.join(isa_names())}")
        self.isa = isa or isa_names()[0]
        self._team = Team(num_threads, share=share_threads)
        self._threads = self._team.threads()
        self._workspace = _native.Workspace()
        self._last: tuple[RowFormat, RowLayout] | None = None

    def __call__(
        self, q: Tensor, rows: Tensor, codec: Codec, slots: Tensor, counts: Tensor, softcap: float | None = None
    ) -> Attended:
        """Attend with q `[B, H, D]` to `slots` Int32[B, J, K] of `rows` UInt8[R, row_bytes]; `counts` Int32[B] count.

        Counts are at least 1, slots valid and without duplicates within a set; `check_slots` says whether they are.
        """
        check_decode(q, rows, codec.format, slots, counts)
        q, slots, counts = q.contiguous(), slots.contiguous(), counts.contiguous()
        attended = Attended(torch.empty_like(q), torch.empty(slots.shape), torch.empty(q.shape[:2]))
        task = _decode_task(self._layout(codec.format), q, rows, slots, counts, attended, softcap)
        self._workspace.decode(isa=self.isa, threads=self._threads, task=task)
        return attended

    def in_pieces(
        self, q: Tensor, codec: Codec, counts: Tensor, num_slots: int, softcap: float | None = None
    ) -> CpuPieces:
        """See `DecodeKernel`: q `[B, H, D]`, counts Int32[B]."""
        layout = self._layout(codec.format)
        return CpuPieces(self.isa, self._team, self._workspace, layout, codec.format, q, counts, num_slots, softcap)

    def piece_columns(self, row_format: RowFormat, num_heads: int) -> int:
        """See `DecodeKernel`."""
        return library().PIECE_COLUMNS

    def append(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's pool; nothing else is touched."""
        check_append(rows, row_format, slots, k, v)
        k, v, slots = _dense_tokens(k), _dense_tokens(v), slots.contiguous()
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

    def select(
        self,
        scores: Tensor,
        starts: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
    ) -> Tensor:
        """Positions Int32[B, num_slots] that each sequence reads: ascending, 0 after `counts` Int32[B].

        Of positions [0, older_ends[b]) those `older_counts[b]` with the largest scores (of equal ones, the older), then
        the positions from `older_ends[b]` on.

        Args:
            scores: Float64 or Float32 `[T]`, contiguous; position p of sequence b has element `starts[b] + p`.
            starts: Int64[B].
            older_ends: Int32[B].
            older_counts: Int32[B], each at most `older_ends`.
            counts: Int32[B], each at least `older_counts` and at most `num_slots`.
            num_slots: K.
            width: of no influence here.
        """
        check_select(scores, starts, older_ends, older_counts, counts)
        positions = torch.empty(len(starts), num_slots, dtype=torch.int32)
        library().select(
            threads=self._threads,
            scores=scores.data_ptr(),
            wide=scores.dtype == torch.float64,
            lane_stride=1,
            lanes=starts.data_ptr(),
            older_ends=older_ends.data_ptr(),
            older_counts=older_counts.data_ptr(),
            counts=counts.data_ptr(),
            num_seqs=len(starts),
            num_slots=num_slots,
            positions=positions.data_ptr(),
        )
        return positions

    def observe(
        self,
        sums: Tensor,
        buckets: Tensor,
        sum_starts: Tensor,
        bucket_starts: Tensor,
        positions: Tensor,
        counts: Tensor,
        mass: Tensor,
    ) -> None:
        """Sums and buckets have grown by the mass of the tokens attended.

        Args:
            sums: Float64, contiguous; token p of sequence b is its element `sum_starts[b] + p`.
            buckets: Float32, contiguous, addressed by `bucket_starts` in the same way.
            sum_starts: Int64[B].
            bucket_starts: Int64[B].
            positions: Int32[B, K].
            counts: Int32[B], the real ones of each row.
            mass: Float32[B, K].
        """
        check_observe(sums, buckets, sum_starts, bucket_starts, positions, counts, mass)
        num_seqs, num_slots = positions.shape
        library().observe(
            sums=sums.data_ptr(),
            buckets=buckets.data_ptr(),
            sum_starts=sum_starts.data_ptr(),
            bucket_starts=bucket_starts.data_ptr(),
            positions=positions.data_ptr(),
            counts=counts.data_ptr(),
            mass=mass.data_ptr(),
            num_seqs=num_seqs,
            num_slots=num_slots,
        )

    def sketch_append(self, sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
        """The sketch holds these keys or values at its rows `ids`, each head between its own minimum and maximum.

        Args:
            sketch: of T rows; byte i of a head of P bytes holds its codes i, i + P, i + 2P, ..., lowest bits first.
            ids: Int64[N], each below T.
            vectors: `[N, G, D]` in a float dtype.
        """
        check_sketch_append(sketch, ids, vectors)
        num_tokens, num_heads, head_dim = vectors.shape
        vectors, ids = _dense_tokens(vectors), ids.contiguous()
        self._workspace.sketch_append(
            isa=self.isa,
            threads=self._threads,
            bits=sketch.bits,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            keys=vectors.data_ptr(),
            dtype=VALUE_CODES[vectors.dtype],
            stride=vectors.stride(0) * vectors.element_size(),
            codes=sketch.codes.data_ptr(),
            ranges=sketch.ranges.data_ptr(),
            ids=ids.data_ptr(),
            num_tokens=num_tokens,
        )

    def sketch_scores(
        self, query: Tensor, keys: Sketch, starts: Tensor, lengths: Tensor, width: int, num_sets: int
    ) -> Tensor:
        """Approximate attention weights Float32[B, num_sets, width] of tokens starts[b] .. starts[b] + lengths[b] - 1.

        Softmax of query times sketched key over sqrt(D), for each head on its own, summed over the heads of each index
        set; 0 from lengths[b] on. The query is rounded to 1/32639 of its largest value.

        Args:
            query: `[B, H, D]` in a float dtype.
            keys: sketched.
            starts: Int64[B], rows of the sketch.
            lengths: Int32[B], each at least 1.
            width: at least the largest length.
            num_sets: 1 for all heads together, G for the heads of one KV head each.
        """
        check_sketch_scores(query, keys, starts, lengths, num_sets)
        query, starts, lengths = query.contiguous(), starts.contiguous(), lengths.contiguous()
        scores = torch.empty(len(query), num_sets, width)
        self._workspace.sketch_scores(
            isa=self.isa,
            threads=self._threads,
            task=_sketch_task(query, keys, starts, lengths, width, num_sets),
            out=scores.data_ptr(),
        )
        return scores

    def sketch_select(
        self,
        query: Tensor,
        keys: Sketch,
        starts: Tensor,
        lengths: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
        num_sets: int,
    ) -> tuple[Tensor, Tensor]:
        """What `select` chooses by these scores, and the share of each head's weight that lies on it.

        Args:
            query: `[B, H, D]` in a float dtype; it, the keys, starts and lengths are as in `sketch_scores`.
            keys: sketched.
            starts: Int64[B].
            lengths: Int32[B].
            older_ends: Int32[B * J], the sets of a sequence in order; it and the next two are as in `select`.
            older_counts: Int32[B * J].
            counts: Int32[B * J], the same for all sets of a sequence.
            num_slots: K.
            width: at least the largest length.
            num_sets: J: 1 for all heads together, G for the heads of one KV head each.

        Returns:
            Positions Int32[B * J, K], and shares Float32[B, H]: exactly 1 where everything is read.
        """
        check_sketch_scores(query, keys, starts, lengths, num_sets)
        check_sketch_select(query, num_sets, older_ends, older_counts, counts)
        query, starts, lengths = query.contiguous(), starts.contiguous(), lengths.contiguous()
        task = _sketch_task(query, keys, starts, lengths, width, num_sets)
        return self._select(task, query, older_ends, older_counts, counts, num_slots)

    def sketch_complete(
        self,
        query: Tensor,
        keys: Sketch,
        values: Sketch,
        starts: Tensor,
        lengths: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
        width: int,
        num_sets: int,
    ) -> Completed:
        """The same, and what the other tokens add by the sketch of their values.

        Args:
            query: `[B, H, D]` in a float dtype; it and all but the values are as in `sketch_select`.
            keys: sketched.
            values: sketched, of the same rows.
            starts: Int64[B].
            lengths: Int32[B].
            older_ends: Int32[B * J].
            older_counts: Int32[B * J].
            counts: Int32[B * J].
            num_slots: K.
            width: at least the largest length.
            num_sets: J.

        Returns:
            Positions, shares, and a rest Float32[B, H, D] that is exactly 0 where everything is read.
        """
        check_sketch_scores(query, keys, starts, lengths, num_sets)
        check_sketch_values(query, keys, values)
        check_sketch_select(query, num_sets, older_ends, older_counts, counts)
        query, starts, lengths = query.contiguous(), starts.contiguous(), lengths.contiguous()
        rest = torch.empty(query.shape)
        task = _sketch_task(query, keys, starts, lengths, width, num_sets, (values, rest))
        return Completed(*self._select(task, query, older_ends, older_counts, counts, num_slots), rest)

    def rest_blend(self, out: Tensor, shares: Tensor, rest: Tensor) -> Tensor:
        """`[B, H, D]`: out in a float dtype at its share of weight Float32[B, H], and the rest Float32[B, H, D]."""
        check_rest_blend(out, shares, rest)
        out, shares, rest = out.contiguous(), shares.contiguous(), rest.contiguous()
        num_seqs, num_heads, head_dim = out.shape
        blended = torch.empty_like(out)
        self._workspace.rest_blend(
            isa=self.isa,
            threads=self._threads,
            head_dim=head_dim,
            num_heads=num_heads,
            read=out.data_ptr(),
            out=blended.data_ptr(),
            dtype=VALUE_CODES[out.dtype],
            shares=shares.data_ptr(),
            rest=rest.data_ptr(),
            num_seqs=num_seqs,
        )
        return blended

    def mean_add(self, sums: Tensor, req_index: Tensor, values: Tensor) -> None:
        """Sums Float64[N, G, D], contiguous, have grown by values `[n, G, D]` of sequences Int64[n]."""
        check_mean_add(sums, req_index, values)
        values, req_index = _dense_tokens(values), req_index.contiguous()
        num_tokens, num_kv_heads, head_dim = values.shape
        self._workspace.mean_add(
            isa=self.isa,
            sums=sums.data_ptr(),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            values=values.data_ptr(),
            dtype=VALUE_CODES[values.dtype],
            stride=values.stride(0) * values.element_size(),
            lanes=req_index.data_ptr(),
            num_tokens=num_tokens,
        )

    def mean_blend(self, sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        """`[B, H, D]`: out, and the mean sums / lengths for what its share of weight Float32[B, H] lacks of 1.

        Sums are Float64[req_indices, G, D], contiguous, req_indices Int64[B], lengths Int32[B], out `[B, H, D]` in a
        float dtype.
        """
        check_mean_blend(sums, req_index, lengths, out, shares)
        out, req_index = out.contiguous(), req_index.contiguous()
        lengths, shares = lengths.contiguous(), shares.contiguous()
        num_seqs, num_heads, head_dim = out.shape
        blended = torch.empty_like(out)
        self._workspace.mean_blend(
            isa=self.isa,
            threads=self._threads,
            sums=sums.data_ptr(),
            num_kv_heads=sums.shape[1],
            head_dim=head_dim,
            num_heads=num_heads,
            read=out.data_ptr(),
            out=blended.data_ptr(),
            dtype=VALUE_CODES[out.dtype],
            shares=shares.data_ptr(),
            lanes=req_index.data_ptr(),
            lengths=lengths.data_ptr(),
            num_seqs=num_seqs,
        )
        return blended

    def _select(
        self,
        task: SketchTask,
        query: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
    ) -> tuple[Tensor, Tensor]:
        """Positions and shares of a task that has been checked."""
        positions = torch.empty(len(counts), num_slots, dtype=torch.int32)
        shares = torch.empty(query.shape[:2])
        self._workspace.sketch_select(
            isa=self.isa,
            threads=self._threads,
            task=task,
            older_ends=older_ends.data_ptr(),
            older_counts=older_counts.data_ptr(),
            counts=counts.data_ptr(),
            num_slots=num_slots,
            positions=positions.data_ptr(),
            shares=shares.data_ptr(),
        )
        return positions, shares

    def _layout(self, row_format: RowFormat) -> RowLayout:
        if self._last is None or self._last[0] is not row_format:
            layout = library().RowLayout(_ROW_DTYPES[row_format.dtype], row_format.num_kv_heads, row_format.head_dim)
            assert layout.row_bytes == row_format.row_bytes, "RowFormat and RowLayout count bytes differently"
            self._last = row_format, layout
        return self._last[1]


class CpuPieces:
    """See `AttentionPieces`; made by `CpuKernels.in_pieces`."""

    def __init__(
        self,
        isa: str,
        team: Team,
        workspace: Workspace,
        layout: RowLayout,
        row_format: RowFormat,
        q: Tensor,
        counts: Tensor,
        num_slots: int,
        softcap: float | None,
    ) -> None:
        self._softcap = softcap
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
        self._plan = library().Plan()

    def add(self, rows: Tensor, slots: Tensor, begins: Tensor, ends: Tensor) -> None:
        """See `AttentionPieces`."""
        check_decode(self._q, rows, self._format, slots, self._counts)
        check_piece(begins, ends, self._counts)
        slots, begins, ends = slots.contiguous(), begins.contiguous(), ends.contiguous()
        self._workspace.decode_piece(
            isa=self._isa,
            threads=self._team.threads(),
            task=_decode_task(self._layout, self._q, rows, slots, self._counts, self._attended, self._softcap),
            plan=self._plan,
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
            task=_decode_task(self._layout, self._q, rows, slots, self._counts, self._attended, self._softcap),
            plan=self._plan,
        )
        return self._attended


def _decode_task(
    layout: RowLayout,
    q: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    attended: Attended,
    softcap: float | None,
) -> DecodeTask:
    """Checked, contiguous tensors as addresses: they must live as long as it is used."""
    num_seqs, num_heads, _ = q.shape
    assert _native is not None, "whoever gets here has a layout from it"
    return _native.DecodeTask(
        layout=layout,
        q=q.data_ptr(),
        q_dtype=VALUE_CODES[q.dtype],
        rows=rows.data_ptr(),
        row_stride=rows.stride(0),
        slots=slots.data_ptr(),
        counts=counts.data_ptr(),
        num_seqs=num_seqs,
        num_heads=num_heads,
        num_sets=slots.shape[1],
        num_slots=slots.shape[2],
        out=attended.out.data_ptr(),
        mass=attended.mass.data_ptr(),
        log_sum_exp=attended.log_sum_exp.data_ptr(),
        softcap=softcap or 0.0,
    )


def _sketch_task(
    query: Tensor,
    keys: Sketch,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    num_sets: int,
    completion: tuple[Sketch, Tensor] | None = None,
) -> SketchTask:
    """Checked, contiguous tensors as addresses: they must live as long as it is used.

    `completion` are sketched values, and where the rest goes.
    """
    num_seqs, num_heads, head_dim = query.shape
    assert _native is not None, "whoever gets here has a workspace from it"
    values, rest = completion or (None, None)
    return _native.SketchTask(
        bits=keys.bits,
        num_kv_heads=keys.codes.shape[1],
        head_dim=head_dim,
        q=query.data_ptr(),
        q_dtype=VALUE_CODES[query.dtype],
        codes=keys.codes.data_ptr(),
        ranges=keys.ranges.data_ptr(),
        starts=starts.data_ptr(),
        lengths=lengths.data_ptr(),
        num_seqs=num_seqs,
        num_heads=num_heads,
        num_sets=num_sets,
        width=width,
        value_bits=0 if values is None else values.bits,
        value_codes=0 if values is None else values.codes.data_ptr(),
        value_ranges=0 if values is None else values.ranges.data_ptr(),
        rest=0 if rest is None else rest.data_ptr(),
    )


def library():  # noqa: ANN201 - the module itself, or an error
    """The native module, for the other files of this package; see `available`.

    Raises:
        RuntimeError: there is none.
    """
    if _native is None:
        raise RuntimeError(_MISSING)
    return _native


def _dense_tokens(values: Tensor) -> Tensor:
    """`[N, G, D]` with each token's values in one run; a copy only where they are not."""
    is_dense = values.stride(2) == 1 and (values.shape[1] == 1 or values.stride(1) == values.shape[2])
    return values if is_dense else values.contiguous()
