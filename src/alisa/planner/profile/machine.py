"""This machine, measured part by part: everything that a plan needs, in about ten seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from alisa.config import WeightFormat
from alisa.kernels.base import AppendKernel, DecodeKernel, MoveRows, PrefillKernel, SelectionKernels
from alisa.model.linear import LinearMaker
from alisa.planner.hardware import Hardware
from alisa.planner.profile.products import measure_gemm, measure_layer, measure_logits, measure_values
from alisa.planner.profile.rows import measure_attention, measure_prompt, measure_selection
from alisa.planner.profile.tiers import measure_link, measure_lookup, measure_rebuild
from alisa.planner.shapes import SHAPES
from alisa.policy.registry import make_policy

ROW_DTYPES = ("float32", "bfloat16", "int8", "int4", "k8v4")
_FREE_DISK_SHARE = 0.8


class Tools(NamedTuple):
    """The kernels that the engine would use."""

    prefill: PrefillKernel
    attend: DecodeKernel
    append: AppendKernel | None
    selection: SelectionKernels
    move_rows: MoveRows
    linears: Callable[[WeightFormat, torch.dtype], LinearMaker]
    """By what they are kept in and what the model computes in."""


def measure_machine(tools: Tools, directory: Path, where: str, progress: Callable[[str], None]) -> Hardware:
    """The machine as it is now; nothing else should run meanwhile.

    Args:
        tools: the kernels to measure.
        directory: whose disk takes the rows below.
        where: what to say of the figures' origin.
        progress: told what is measured next.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    gemm = {}
    for name, dtype in dtypes.items():
        progress(f"matrix products in {name}")
        gemm[name] = measure_gemm(dtype, tools.linears("float", dtype))
    first = torch.bfloat16
    for name in ("int8", "int4"):
        progress(f"matrix products with {name} weights")
        gemm[name] = measure_gemm(first, tools.linears(name, first))
    attention = {}
    for name in ROW_DTYPES:
        progress(f"attention over {name} rows")
        attention[name] = measure_attention(name, dtypes.get(name, first), tools.attend, tools.append)
    progress("selection")
    few = replace(SHAPES["opt-125m"], num_layers=4)
    selection = {
        kind: measure_selection(make_policy(name, 0.8), few, tools.selection)
        for kind, name in (("none", "dense"), ("ranked", "swa"), ("sketch-keys", "sketch-mean"), ("sketch", "sketch"))
    }
    progress("rows on disk")
    read, write = measure_link(directory, tools.move_rows)
    lookup = measure_lookup(directory, tools.move_rows, tools.append)
    rebuild_call_s, rebuild_row_s = measure_rebuild(directory, tools.move_rows, first)
    progress("prompts and layers")
    prefill_value_s, observed_value_s = measure_prompt(first, tools.prefill)
    layer = measure_layer(first, gemm["bfloat16"])
    return Hardware(
        name="this",
        where=where,
        device_bytes=psutil.virtual_memory().available,
        below="disk",
        below_bytes=int(shutil.disk_usage(directory).free * _FREE_DISK_SHARE),
        packs_tied=True,
        gemm=gemm,
        attention=attention,
        selection=selection,
        read=read,
        write=write,
        lookup_call_s=lookup.call_s,
        lookup_row_s=lookup.row_s,
        place_s=lookup.place_s,
        rebuild_call_s=rebuild_call_s,
        rebuild_row_s=rebuild_row_s,
        prefill_value_s=prefill_value_s,
        observed_value_s=observed_value_s,
        layer_s=layer.layer_s,
        rope_s=layer.rope_s,
        value_s=measure_values(first),
        step_s=layer.step_s,
        logit_s=measure_logits(),
        overlap=0.0,
        write_overlap=0.0,
    )
