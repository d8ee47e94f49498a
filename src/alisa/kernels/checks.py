"""What every set of kernels asks of its arguments: shapes, dtypes and strides, never values.

An argument that does not fit is a ValueError, one of the wrong dtype a TypeError; both say what was given and what
fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alisa.kernels.base import Panels, Ranking, Sketch
from alisa.kernels.sketch_step import StepSlots
from alisa.spec import LANES, SPAN, STEP_INPUTS, RowFormat

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of queries, keys and values."""
CODE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8, "int4": torch.uint8}
"""By the format of a weight."""


def check_decode(
    q: Tensor, rows: Tensor, row_format: RowFormat, slots: Tensor, counts: Tensor, entries: Tensor | None = None
) -> None:
    """The arguments of decode attention fit each other; raises otherwise."""
    num_seqs, num_heads, head_dim = q.shape
    num_sets = slots.shape[1]
    _check_rows(rows, row_format)
    if (
        head_dim != row_format.head_dim
        or num_heads % row_format.num_kv_heads
        or num_sets not in (1, row_format.num_kv_heads)
        or counts.shape != (num_seqs,)
        or (slots.shape[0] != num_seqs if entries is None else entries.shape != (num_seqs,))
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, slots {tuple(slots.shape)} and counts {tuple(counts.shape)} do not fit "
            f"each other or rows of {row_format}"
        )
    if slots.dtype != torch.int32 or counts.dtype != torch.int32 or q.dtype not in VALUE_DTYPES:
        raise TypeError(f"slots and counts are int32 and q is a float, not {slots.dtype}, {counts.dtype}, {q.dtype}")
    if entries is not None and entries.dtype != torch.int32:
        raise TypeError(f"entries are int32, not {entries.dtype}")


def check_piece(begins: Tensor, ends: Tensor, slots: Tensor) -> None:
    """A piece of a selection says for each entry of `slots` where it begins and ends; raises otherwise."""
    if begins.shape != slots.shape[:1] or ends.shape != slots.shape[:1]:
        raise ValueError(f"begins {tuple(begins.shape)} and ends {tuple(ends.shape)} are not ({slots.shape[0]},)")
    if begins.dtype != torch.int32 or ends.dtype != torch.int32:
        raise TypeError(f"begins and ends are int32, not {begins.dtype} and {ends.dtype}")


def check_panels(panels: Panels, bias: Tensor | None) -> None:
    """A weight has the shape that its numbers say, and the bias fits it; raises otherwise."""
    dtype = CODE_DTYPES[panels.format]
    num_panels = panels.parts * -(-panels.num_out // (panels.parts * LANES))
    spans = -(-panels.num_in // SPAN)
    steps = -(-(spans * SPAN if panels.format == "int4" else panels.num_in) // STEP_INPUTS[panels.format])
    shape = (num_panels, steps, LANES, 4 // dtype.itemsize)
    if panels.codes.shape != shape or panels.codes.dtype != dtype or not panels.codes.is_contiguous():
        raise ValueError(f"codes {tuple(panels.codes.shape)} in {panels.codes.dtype} are not {shape} in {dtype}")
    if panels.num_out % panels.parts:
        raise ValueError(f"{panels.num_out} outputs are not {panels.parts} parts of one size")
    if panels.format == "int8":
        _check_numbers("scales", panels.scales, (panels.num_out,), torch.float32)
    if panels.format == "int4":
        _check_numbers("ranges", panels.ranges, (num_panels, spans, 2, LANES), torch.float16)
    if bias is not None:
        _check_numbers("bias", bias, (panels.num_out,), torch.float32)


def _check_numbers(name: str, numbers: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if numbers is None:
        raise ValueError(f"there are no {name}, which a weight in this format has")
    if numbers.shape != shape or numbers.dtype != dtype or not numbers.is_contiguous():
        raise ValueError(f"the {name} are {tuple(numbers.shape)} in {numbers.dtype}, not {shape} in {dtype}")


def check_turn(heads: Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Heads can be turned by matrices of this many KV heads and this size; raises otherwise."""
    if heads.shape[-1] != head_dim or heads.shape[-2] % num_kv_heads:
        raise ValueError(f"heads {tuple(heads.shape)} are not those of {num_kv_heads} KV heads of {head_dim}")
    if heads.dtype not in VALUE_DTYPES:
        raise TypeError(f"heads are a float, not {heads.dtype}")


def check_append(rows: Tensor, row_format: RowFormat, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """New tokens fit the rows they go to; raises otherwise."""
    _check_rows(rows, row_format)
    shape = (row_format.num_kv_heads, row_format.head_dim)
    if k.shape != (slots.shape[0], *shape) or v.shape != k.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} are not {len(slots)} tokens of {row_format}")
    if slots.dtype != torch.int64 or k.dtype not in VALUE_DTYPES or v.dtype != k.dtype:
        raise TypeError(f"slots are int64, k and v the same float, not {slots.dtype}, {k.dtype}, {v.dtype}")


def check_select(scores: Tensor, starts: Tensor, older_ends: Tensor, older_counts: Tensor, counts: Tensor) -> None:
    """The arguments of a selection fit each other; raises otherwise."""
    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1 or not scores.is_contiguous():
        raise TypeError(
            f"scores are float32 or float64 in one run, not {scores.dtype} {tuple(scores.shape)} of strides "
            f"{scores.stride()}"
        )
    integers = (older_ends, older_counts, counts)
    if starts.dtype != torch.int64 or any(values.dtype != torch.int32 for values in integers):
        raise TypeError("starts are int64; older_ends, older_counts and counts are int32")
    if not all(values.is_contiguous() and values.numel() == len(starts) for values in (starts, *integers)):
        raise ValueError(f"starts, older_ends, older_counts and counts hold one number for each of {len(starts)} rows")


def check_observe(
    sums: Tensor,
    buckets: Tensor,
    sum_starts: Tensor,
    bucket_starts: Tensor,
    positions: Tensor,
    counts: Tensor,
    mass: Tensor,
) -> None:
    """Mass can be added to the sums and buckets; raises otherwise."""
    tensors = (sums, buckets, sum_starts, bucket_starts, positions, counts, mass)
    dtypes = (torch.float64, torch.float32, torch.int64, torch.int64, torch.int32, torch.int32, torch.float32)
    if any(values.dtype != dtype for values, dtype in zip(tensors, dtypes, strict=True)):
        raise TypeError(f"dtypes are {[values.dtype for values in tensors]}, not {list(dtypes)}")
    if not all(values.is_contiguous() for values in tensors) or mass.shape != positions.shape:
        raise ValueError("observe needs contiguous tensors, and a mass for every position")


def check_sketch_append(sketch: Sketch, ids: Tensor, vectors: Tensor) -> None:
    """New keys or values fit the sketch they go to; raises otherwise."""
    num_tokens, num_heads, head_dim = vectors.shape
    _check_sketch(sketch, num_heads, head_dim)
    if ids.shape != (num_tokens,):
        raise ValueError(f"{num_tokens} vectors need as many ids, not {tuple(ids.shape)}")
    if ids.dtype != torch.int64 or vectors.dtype not in VALUE_DTYPES:
        raise TypeError(f"ids are int64 and vectors a float, not {ids.dtype}, {vectors.dtype}")


def check_sketch_scores(query: Tensor, keys: Sketch, starts: Tensor, lengths: Tensor, num_sets: int) -> None:
    """A query and the sequences it asks for fit the sketch; raises otherwise."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = keys.num_kv_heads
    _check_sketch(keys, num_kv_heads, head_dim)
    if (
        num_heads % num_kv_heads
        or num_sets not in (1, num_kv_heads)
        or starts.shape != (num_seqs,)
        or lengths.shape != (num_seqs,)
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, starts {tuple(starts.shape)}, lengths {tuple(lengths.shape)} and "
            f"{num_sets} index sets do not fit each other or a sketch of {num_kv_heads} heads"
        )
    if starts.dtype != torch.int64 or lengths.dtype != torch.int32 or query.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"starts are int64, lengths int32, the query a float, not {starts.dtype}, {lengths.dtype}, {query.dtype}"
        )


def check_sketch_values(query: Tensor, keys: Sketch, values: Sketch) -> None:
    """The sketch of the values has the rows of that of the keys; raises otherwise."""
    _check_sketch(values, keys.num_kv_heads, query.shape[2])
    if values.parts != keys.parts:
        raise ValueError(f"heads of the values are in {values.parts} parts and those of the keys in {keys.parts}")
    if values.codes.shape[0] != keys.codes.shape[0]:
        raise ValueError(f"{len(values.codes)} sketched values are not those of {len(keys.codes)} sketched keys")


def check_ranking(query: Tensor, keys: Sketch, ranking: Ranking) -> None:
    """A query and what is ranked for it fit the sketch, with a budget for each index set; raises otherwise."""
    starts, lengths, older_ends, older_counts, counts, _, _, num_sets, _, coverages = ranking
    check_sketch_scores(query, keys, starts, lengths, num_sets)
    # Written out, as are others here: this runs in every layer of every step.
    shape = (query.shape[0] * num_sets,)
    if (
        older_ends.shape != shape
        or older_counts.shape != shape
        or counts.shape != shape
        or not (older_ends.is_contiguous() and older_counts.is_contiguous() and counts.is_contiguous())
    ):
        shapes = [tuple(values.shape) for values in (older_ends, older_counts, counts)]
        raise ValueError(
            f"{len(query)} sequences of {num_sets} index sets need as many contiguous budgets, not {shapes}"
        )
    if older_ends.dtype != torch.int32 or older_counts.dtype != torch.int32 or counts.dtype != torch.int32:
        raise TypeError(f"budgets are int32, not {[older_ends.dtype, older_counts.dtype, counts.dtype]}")
    if coverages is not None and (coverages.dtype != torch.float64 or coverages.shape != query.shape[:1]):
        raise ValueError(f"{len(query)} sequences need as many coverages, float64")


def check_step_slots(slots: StepSlots, num_tokens: int) -> None:
    """A step of this many new tokens can look up slots; raises otherwise."""
    new, table, table_rows = slots
    if table.dtype != torch.int32 or table.dim() != 2 or table.stride(1) != 1:
        raise TypeError(f"a table of slots is Int32[S, W], not {table.dtype} {tuple(table.shape)}")
    if (len(table) if table_rows is None else len(table_rows)) != num_tokens or len(new) != num_tokens:
        raise ValueError(f"{num_tokens} new tokens have no slots in {len(table)} rows of the table")
    if table_rows is not None and (table_rows.dtype != torch.int64 or not table_rows.is_contiguous()):
        raise TypeError(f"rows of the table are Int64[B] in one run, not {table_rows.dtype}")


def check_mean_add(sums: Tensor, req_index: Tensor, values: Tensor) -> None:
    """New values fit the sums they go to; raises otherwise."""
    _check_sums(sums, values.shape[1], values.shape[2])
    if req_index.shape != values.shape[:1]:
        raise ValueError(f"{len(values)} values need as many req_indices, not {tuple(req_index.shape)}")
    if req_index.dtype != torch.int64 or values.dtype not in VALUE_DTYPES:
        raise TypeError(f"req_indices are int64 and values a float, not {req_index.dtype}, {values.dtype}")


def check_mean_blend(sums: Tensor, req_index: Tensor, lengths: Tensor, out: Tensor, shares: Tensor) -> None:
    """Sequences, their outputs and the sums fit each other; raises otherwise."""
    num_seqs, num_heads, head_dim = out.shape
    _check_sums(sums, sums.shape[1], head_dim)
    if (
        num_heads % sums.shape[1]
        or req_index.shape != (num_seqs,)
        or lengths.shape != (num_seqs,)
        or shares.shape != (num_seqs, num_heads)
    ):
        raise ValueError(
            f"output {tuple(out.shape)}, req_index {tuple(req_index.shape)}, lengths {tuple(lengths.shape)} and "
            f"shares {tuple(shares.shape)} do not fit each other or sums of {sums.shape[1]} heads"
        )
    dtypes = (req_index.dtype, lengths.dtype, shares.dtype)
    if dtypes != (torch.int64, torch.int32, torch.float32) or out.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"req_index, lengths and shares are int64, int32, float32 and the output a float, not {dtypes}, {out.dtype}"
        )


def check_rest_blend(out: Tensor, shares: Tensor, rest: Tensor) -> None:
    """Outputs, their shares and what the other tokens add fit each other; raises otherwise."""
    if rest.shape != out.shape or shares.shape != out.shape[:2]:
        raise ValueError(
            f"output {tuple(out.shape)}, shares {tuple(shares.shape)} and rest {tuple(rest.shape)} do not fit"
        )
    if shares.dtype != torch.float32 or rest.dtype != torch.float32 or out.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"shares and rest are float32, the output a float, not {shares.dtype}, {rest.dtype}, {out.dtype}"
        )


def check_prefill(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries `[T, H, D]`, keys and values `[S, G, D]` fit each other; raises otherwise."""
    if k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    if any(values.dtype != torch.bfloat16 for values in (q, k, v)):
        raise TypeError(f"q, k and v are bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")


def _check_sums(sums: Tensor, num_heads: int, head_dim: int) -> None:
    if sums.dtype != torch.float64 or sums.shape[1:] != (num_heads, head_dim) or not sums.is_contiguous():
        raise ValueError(
            f"sums are contiguous Float64[req_indices, {num_heads}, {head_dim}], not {sums.dtype} {tuple(sums.shape)}"
        )


def _check_rows(rows: Tensor, row_format: RowFormat) -> None:
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_format.row_bytes or rows.stride(1) != 1:
        raise ValueError(
            f"a pool of {row_format} is UInt8[R, {row_format.row_bytes}] with whole rows, not {rows.dtype} "
            f"{tuple(rows.shape)} of strides {rows.stride()}"
        )


def _check_sketch(sketch: Sketch, num_heads: int, head_dim: int) -> None:
    codes, ranges, bits, parts = sketch
    if bits not in (2, 4, 8):
        raise ValueError(f"a sketch has 2, 4 or 8 bits per value, not {bits}")
    if codes.dtype != torch.uint8 or ranges.dtype != torch.float16:
        raise TypeError(f"codes are uint8 and ranges float16, not {codes.dtype}, {ranges.dtype}")
    expected = (num_heads * parts, -(-head_dim // parts * bits // 8))
    if codes.shape[1:] != expected or ranges.shape != (codes.shape[0], expected[0], 2) or head_dim % parts:
        raise ValueError(
            f"codes {tuple(codes.shape)} and ranges {tuple(ranges.shape)} are not [T, {expected[0]}, {expected[1]}] "
            f"and [T, {expected[0]}, 2], as {bits} bits for {num_heads} heads of {head_dim} in {parts} parts need"
        )
    if not (codes.is_contiguous() and ranges.is_contiguous()):
        raise ValueError("codes and ranges of a sketch are contiguous")
