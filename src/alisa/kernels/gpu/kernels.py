"""The GPU kernels as functions of tensors, with the arguments and results of `CpuKernels`.

This file checks dtypes, shapes and strides; each kernel's own file launches it. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.gpu.append import launch_append
from alisa.kernels.gpu.decode import launch_decode
from alisa.kernels.gpu.observe import launch_observe
from alisa.kernels.gpu.select import launch_select
from alisa.kernels.gpu.sketch_append import launch_sketch_append
from alisa.kernels.gpu.sketch_scores import launch_sketch_scores
from alisa.types import Attended, Codec, RowFormat

_VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonKernels:
    """The Triton kernels; calling it is decode attention (see `DecodeKernel`). Tensors lie on the current CUDA device."""

    def __call__(self, q: Tensor, rows: Tensor, codec: Codec, slots: Tensor, counts: Tensor) -> Attended:
        """Attend with q `[B, H, D]` to `slots` Int32[B, J, K] of `rows` UInt8[R, row_bytes]; `counts` Int32[B] count.

        Counts are at least 1, slots valid and without duplicates within a set.
        """
        row_format = codec.format
        num_seqs, num_heads, head_dim = q.shape
        _, num_sets, num_slots = slots.shape
        _check_rows(rows, row_format)
        if (
            head_dim != row_format.head_dim
            or num_heads % row_format.num_kv_heads
            or num_sets not in (1, row_format.num_kv_heads)
            or slots.shape[0] != num_seqs
            or counts.shape != (num_seqs,)
            or num_slots == 0
        ):
            raise ValueError(
                f"q {tuple(q.shape)}, slots {tuple(slots.shape)} and counts {tuple(counts.shape)} do not fit "
                f"each other or rows of {row_format}"
            )
        if slots.dtype != torch.int32 or counts.dtype != torch.int32 or q.dtype not in _VALUE_DTYPES:
            raise TypeError(
                f"slots and counts are int32 and q is a float, not {slots.dtype}, {counts.dtype}, {q.dtype}"
            )
        return launch_decode(q.contiguous(), rows, row_format, slots.contiguous(), counts.contiguous())

    def append(self, rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V `[N, G, D]` stand as rows at `slots` Int64[N] of one layer's arena; nothing else is touched."""
        _check_rows(rows, row_format)
        shape = (row_format.num_kv_heads, row_format.head_dim)
        if k.shape != (len(slots), *shape) or v.shape != k.shape:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} are not {len(slots)} tokens of {row_format}")
        if slots.dtype != torch.int64 or k.dtype not in _VALUE_DTYPES or v.dtype != k.dtype:
            raise TypeError(f"slots are int64, k and v the same float, not {slots.dtype}, {k.dtype}, {v.dtype}")
        launch_append(rows, row_format, slots.contiguous(), _whole_heads(k), _whole_heads(v))

    def select(
        self,
        scores: Tensor,
        lanes: Tensor,
        older_ends: Tensor,
        older_counts: Tensor,
        counts: Tensor,
        num_slots: int,
    ) -> Tensor:
        """Positions Int32[N, num_slots] that each row reads: ascending, 0 behind `counts` Int32[N].

        Of positions [0, older_ends[i]) those `older_counts[i]` with the largest `scores[lanes[i]]` (of equal ones, the
        older), then the positions from `older_ends[i]` on. Scores are Float64 or Float32 rows, lanes Int64[N], the
        others Int32[N]; `older_counts` is at most `older_ends`, and `counts` lies between it and `num_slots`.
        """
        if scores.dtype not in (torch.float32, torch.float64) or scores.stride(1) != 1:
            raise TypeError(f"scores are rows of float32 or float64, not {scores.dtype} of strides {scores.stride()}")
        integers = (older_ends, older_counts, counts)
        if lanes.dtype != torch.int64 or any(values.dtype != torch.int32 for values in integers):
            raise TypeError("lanes are int64; older_ends, older_counts and counts are int32")
        if not all(values.is_contiguous() and values.numel() == len(lanes) for values in (lanes, *integers)):
            raise ValueError(
                f"lanes, older_ends, older_counts and counts hold one number for each of {len(lanes)} rows"
            )
        return launch_select(scores, lanes, older_ends, older_counts, counts, num_slots)

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
            sums: Float64, contiguous; token p of row i is its element `sum_starts[i] + p`.
            buckets: Float32, contiguous, addressed by `bucket_starts` in the same way.
            sum_starts: Int64[N].
            bucket_starts: Int64[N].
            positions: Int32[N, K], none of them twice among the real ones of a row.
            counts: Int32[N], the real ones of each row.
            mass: Float32[N, K].
        """
        tensors = (sums, buckets, sum_starts, bucket_starts, positions, counts, mass)
        dtypes = (torch.float64, torch.float32, torch.int64, torch.int64, torch.int32, torch.int32, torch.float32)
        if any(values.dtype != dtype for values, dtype in zip(tensors, dtypes, strict=True)):
            raise TypeError(f"dtypes are {[values.dtype for values in tensors]}, not {list(dtypes)}")
        if not all(values.is_contiguous() for values in tensors) or mass.shape != positions.shape:
            raise ValueError("observe needs contiguous tensors, and a mass for every position")
        launch_observe(sums, buckets, sum_starts, bucket_starts, positions, counts, mass)

    def sketch_append(self, codes: Tensor, ranges: Tensor, ids: Tensor, keys: Tensor, bits: int) -> None:
        """Tokens `ids` Int64[N] of codes UInt8[T, G, P] and ranges Float16[T, G, 2] stand for the keys `[N, G, D]`.

        Each head lies between its own minimum and maximum: value = minimum + step * code, (step, minimum) in `ranges`.
        """
        _check_sketch(codes, ranges, bits, keys.shape[1], keys.shape[2])
        if ids.dtype != torch.int64 or ids.shape != keys.shape[:1] or keys.dtype not in _VALUE_DTYPES:
            raise TypeError(
                f"ids are int64, one for each key, and keys a float, not {ids.dtype} {tuple(ids.shape)} and "
                f"{keys.dtype} {tuple(keys.shape)}"
            )
        launch_sketch_append(codes, ranges, ids.contiguous(), _whole_heads(keys), bits)

    def sketch_scores(
        self,
        query: Tensor,
        codes: Tensor,
        ranges: Tensor,
        bits: int,
        starts: Tensor,
        lengths: Tensor,
        width: int,
        num_sets: int,
    ) -> Tensor:
        """Approximate attention weights Float32[B, num_sets, width], summed over the heads of each index set.

        For the query `[B, H, D]` over tokens `starts[b]` to `starts[b] + lengths[b] - 1` of the sketch (Int64[B] and
        Int32[B], at least 1 and at most `width`); 0 from `lengths[b]` on. One set is all heads, G sets are the heads of
        each KV head.
        """
        num_seqs, num_heads, head_dim = query.shape
        num_kv_heads = codes.shape[1]
        _check_sketch(codes, ranges, bits, num_kv_heads, head_dim)
        if num_heads % num_kv_heads or num_sets not in (1, num_kv_heads) or width < 1:
            raise ValueError(
                f"{num_heads} query heads in {num_sets} sets over {width} tokens do not fit {num_kv_heads} KV heads"
            )
        if starts.dtype != torch.int64 or lengths.dtype != torch.int32 or query.dtype not in _VALUE_DTYPES:
            raise TypeError(
                f"starts are int64, lengths int32 and the query a float, not {starts.dtype}, {lengths.dtype}, "
                f"{query.dtype}"
            )
        if starts.shape != (num_seqs,) or lengths.shape != (num_seqs,):
            raise ValueError(f"starts and lengths hold one number for each of {num_seqs} sequences")
        return launch_sketch_scores(
            query.contiguous(), codes, ranges, bits, starts.contiguous(), lengths.contiguous(), width, num_sets
        )


def _check_rows(rows: Tensor, row_format: RowFormat) -> None:
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_format.row_bytes or rows.stride(1) != 1:
        raise ValueError(
            f"an arena of {row_format} is UInt8[R, {row_format.row_bytes}] with whole rows, not {rows.dtype} "
            f"{tuple(rows.shape)} of strides {rows.stride()}"
        )


def _check_sketch(codes: Tensor, ranges: Tensor, bits: int, num_kv_heads: int, head_dim: int) -> None:
    if (
        bits not in (2, 4, 8)
        or codes.dtype != torch.uint8
        or codes.shape[1:] != (num_kv_heads, -(-head_dim * bits // 8))
        or ranges.dtype != torch.float16
        or ranges.shape != (len(codes), num_kv_heads, 2)
        or not (codes.is_contiguous() and ranges.is_contiguous())
    ):
        raise ValueError(
            f"a sketch of {bits} bits (2, 4 or 8) of {num_kv_heads} x {head_dim} values is UInt8[T, {num_kv_heads}, "
            f"{-(-head_dim * bits // 8)}] and Float16[T, {num_kv_heads}, 2], contiguous, not {codes.dtype} "
            f"{tuple(codes.shape)} and {ranges.dtype} {tuple(ranges.shape)}"
        )


def _whole_heads(values: Tensor) -> Tensor:
    """`[N, G, D]` with each head in one run; a copy only where they are not."""
    return values if values.stride(2) == 1 else values.contiguous()
