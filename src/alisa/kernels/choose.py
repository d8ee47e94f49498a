"""Which kernels run: native ones on a CPU, Triton on a GPU, plain torch where neither can."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch

from alisa.kernels.base import (
    AppendKernel,
    DecodeKernel,
    MoveRows,
    PrefillKernel,
    SelectionKernels,
    SparsePrefillKernel,
)
from alisa.kernels.fixed_step import FixedStepKernel
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.native import prefill as cpu_prefill
from alisa.kernels.native.prefill_engine import NativePrefill
from alisa.kernels.native.sketch_step import CpuSketchStep
from alisa.kernels.native.sparse_prefill import NativeSparsePrefill
from alisa.kernels.reference.decode import decode_attention
from alisa.kernels.reference.prefill import prefill_attention
from alisa.kernels.reference.rows import move_rows
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sparse_prefill import sparse_prefill_attention
from alisa.kernels.sketch_step import SketchStepKernel

_LOG = logging.getLogger("alisa")


class AttentionBackend(NamedTuple):
    """What runs on the hot path, and what to call it in a report."""

    prefill: PrefillKernel
    sparse_prefill: SparsePrefillKernel
    attend: DecodeKernel
    selection: SelectionKernels
    append: AppendKernel | None
    move_rows: MoveRows
    sketch_step: SketchStepKernel | None
    """None: a layer that reads by a sketch is a call for each of its parts."""
    fixed_step: FixedStepKernel | None
    """None: a step that reads the same in every layer is a call for each layer."""
    name: str
    """`avx512_vnni`, `avx512`, `avx2` or `portable` for the native ones, `triton` on a GPU, `torch` for their
    references."""


REFERENCE_BACKEND = AttentionBackend(
    prefill_attention,
    sparse_prefill_attention,
    decode_attention,
    ReferenceSelection(),
    None,
    move_rows,
    None,
    None,
    "torch",
)


def choose_backend(device: torch.device) -> AttentionBackend:
    """The fastest kernels for this device; they own working memory, so that each engine should have its own.

    Where faster ones could run but are not installed, one warning says so.
    """
    if device.type == "cuda":
        return _triton_kernels()
    if device.type != "cpu":
        return REFERENCE_BACKEND
    if not library.available():
        _warn_once(library.unavailable_reason())
        return REFERENCE_BACKEND
    native = cpu.CpuKernels()
    prefill: PrefillKernel = prefill_attention
    sparse_prefill: SparsePrefillKernel = sparse_prefill_attention
    if cpu_prefill.available():
        kernel = cpu_prefill.CpuPrefill()
        prefill, sparse_prefill = NativePrefill(kernel), NativeSparsePrefill(kernel)
    return AttentionBackend(
        prefill, sparse_prefill, native, native, native.append, library.move_rows, CpuSketchStep(), native, native.isa
    )


def _triton_kernels() -> AttentionBackend:
    try:
        # Here and not above: triton comes with torch for GPUs, and takes a second to import.
        from alisa.kernels.triton.kernels import TritonKernels
    except ImportError as error:
        _warn_once(f"the GPU kernels need triton ({error})")
        return REFERENCE_BACKEND
    kernels = TritonKernels()
    # Rows on disk go through the memory of the host, whatever the device.
    move = library.move_rows if library.available() else move_rows
    return AttentionBackend(
        prefill_attention, sparse_prefill_attention, kernels, kernels, kernels.append, move, None, None, "triton"
    )


@cache
def _warn_once(reason: str) -> None:
    _LOG.warning("sparse attention runs in plain torch, several times slower: %s.", reason)
