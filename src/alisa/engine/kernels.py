"""Which kernels run: native ones on a CPU, Triton on a GPU, plain torch where neither can."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch

from alisa.attention.decode import DecodeKernel, decode_attention
from alisa.attention.prefill import PrefillKernel, prefill_attention
from alisa.engine.prefill import NativePrefill
from alisa.kernels import cpu, cpu_prefill
from alisa.kv.base import AppendKernel
from alisa.kv.tiers import MoveRows, move_rows
from alisa.policy.base import SelectionKernels

_LOG = logging.getLogger("alisa")


class Kernels(NamedTuple):
    """What runs on the hot path, and what to call it in a report."""

    prefill: PrefillKernel
    attend: DecodeKernel
    selection: SelectionKernels | None
    append: AppendKernel | None
    move_rows: MoveRows
    name: str
    """`avx512_vnni`, `avx512`, `avx2` or `portable` for the native ones, `triton` on a GPU, `torch` for their twins."""


TORCH_KERNELS = Kernels(prefill_attention, decode_attention, None, None, move_rows, "torch")


def choose_kernels(device: torch.device) -> Kernels:
    """The fastest kernels for this device; they own working memory, so that each engine should have its own.

    Where faster ones could run but are not installed, one warning says so.
    """
    if device.type == "cuda":
        return _triton_kernels()
    if device.type != "cpu":
        return TORCH_KERNELS
    if not cpu.available():
        _warn_once(cpu.unavailable_reason())
        return TORCH_KERNELS
    native = cpu.CpuKernels()
    prefill = NativePrefill(cpu_prefill.CpuPrefill()) if cpu_prefill.available() else prefill_attention
    return Kernels(prefill, native, native, native.append, cpu.move_rows, native.isa)


def _triton_kernels() -> Kernels:
    try:
        # Here and not above: triton comes with torch for GPUs, and takes a second to import.
        from alisa.kernels.gpu.kernels import TritonKernels
    except ImportError as error:
        _warn_once(f"the GPU kernels need triton ({error})")
        return TORCH_KERNELS
    kernels = TritonKernels()
    # Rows on disk go through the memory of the host, whatever the device.
    move = cpu.move_rows if cpu.available() else move_rows
    return Kernels(prefill_attention, kernels, kernels, kernels.append, move, "triton")


@cache
def _warn_once(reason: str) -> None:
    _LOG.warning("sparse attention runs in plain torch, several times slower: %s.", reason)
