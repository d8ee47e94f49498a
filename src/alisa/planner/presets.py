"""Machines that are not here, from their data sheets; every assumption is a name in this file.

Peaks are the vendors' (dense, no sparsity). What a program gets of them is assumed alike for every system that is
compared: the comparison is between schedules, not between kernels.
"""

from __future__ import annotations

from alisa.planner.hardware import Attention, Gemm, Hardware, Link, SelectionPrices

MEMORY_SHARE = 0.92
"""Of the device's memory that a program gets: the rest is the context, the allocator's slack and workspaces."""
BANDWIDTH_SHARE = 0.75
"""Of the peak memory bandwidth that a matrix product with few rows, or attention, reaches."""
FLOPS_SHARE = 0.5
"""Of the peak rate that a matrix product with many rows reaches."""
LINK_BYTES_PER_S = 20e9
"""Between GPU and CPU memory, as the paper says of its machines (section 5)."""
LINK_ROW_S = 0.0
"""Packed copies: gathering single tokens costs nothing more than their bytes. Real gathers do worse."""
LAUNCH_S = 12e-6
"""Of one kernel from Python; a layer takes about ten of them."""
KERNELS_PER_LAYER = 10

_GIB = 1 << 30
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def _gpu(name: str, memory_gib: int, bandwidth: float, flops: float, link: float, host_gib: int) -> Hardware:
    bandwidth *= BANDWIDTH_SHARE
    flops *= FLOPS_SHARE
    points = tuple((float(rows), max(2 / bandwidth, 2 * rows / flops)) for rows in _ROWS)
    gemm = Gemm(call_s=0.0, curves=((1.0, points),))
    attention = Attention(call_s=0.0, byte_s=1 / bandwidth, value_s=4 / flops, append_call_s=0.0, append_row_s=0.0)
    copy = Link(call_s=LAUNCH_S, row_s=LINK_ROW_S, bytes_per_s=link)
    dtypes = ("float16", "bfloat16")
    return Hardware(
        name=name,
        where="data sheet and the shares in alisa.planner.presets",
        device_bytes=int(memory_gib * _GIB * MEMORY_SHARE),
        below="host",
        below_bytes=host_gib * _GIB,
        packs_tied=False,
        gemm=dict.fromkeys(dtypes, gemm),
        attention=dict.fromkeys((*dtypes, "int8", "int4", "k8v4"), attention),
        selection={
            "none": SelectionPrices(step_s=0.0, call_s=0.0),
            # Two more kernels a layer; sums of 8 bytes are read and ranked, weights of 4 written.
            "ranked": SelectionPrices(step_s=0.0, call_s=2 * LAUNCH_S, candidate_s=8 / bandwidth, read_s=8 / bandwidth),
            # 4 bits of each key value are read; with a sketch of the values 2 of each of those as well.
            "sketch-keys": SelectionPrices(
                step_s=0.0, call_s=2 * LAUNCH_S, candidate_s=8 / bandwidth, value_s=0.5 / bandwidth
            ),
            "sketch": SelectionPrices(
                step_s=0.0, call_s=2 * LAUNCH_S, candidate_s=8 / bandwidth, value_s=0.75 / bandwidth
            ),
        },
        read=copy,
        write=copy,
        lookup_call_s=LAUNCH_S,
        lookup_row_s=0.0,
        place_s=0.0,
        rebuild_call_s=2 * LAUNCH_S,
        rebuild_row_s=0.0,
        prefill_value_s=4 / flops,
        observed_value_s=2 / flops,
        layer_s=KERNELS_PER_LAYER * LAUNCH_S,
        rope_s=0.0,
        value_s=2 / bandwidth,
        step_s=0.2e-3,
        logit_s=8 / bandwidth,
        overlap=1.0,
        write_overlap=1.0,
    )


PRESETS: dict[str, Hardware] = {
    "v100-16gb": _gpu("v100-16gb", 16, 0.9e12, 112e12, LINK_BYTES_PER_S, 128),
    "v100-32gb": _gpu("v100-32gb", 32, 0.9e12, 112e12, LINK_BYTES_PER_S, 128),
    "rtx4090": _gpu("rtx4090", 24, 1.008e12, 165e12, LINK_BYTES_PER_S, 128),
    "h100-80gb": _gpu("h100-80gb", 80, 3.35e12, 989e12, LINK_BYTES_PER_S, 128),
    "h200": _gpu("h200", 141, 4.8e12, 989e12, 50e9, 256),
}
"""By the name that `alisa plan --hardware` takes. The H200 has a PCIe 5 link; the others the paper's."""
