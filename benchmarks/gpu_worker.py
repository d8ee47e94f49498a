"""The stages of `gpu_check.py`, each in a process of its own: a job on standard input, one result on standard output.

    PYTHONPATH=src python benchmarks/gpu_worker.py ours < job.json

ours      this package's engine on dummy weights; rows that the device has no room for go to main memory
kernels   decode attention against torch, on the device

`device_memory_bytes` limits torch's allocator on a GPU that has more. On a CPU the job's own budget is for K and V.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from alisa.config import EngineConfig
from alisa.engine.builder import CacheOptions
from alisa.kernels.choose import choose_backend
from alisa.lab.bench.case import time_case
from alisa.lab.bench.cases import DecodeCase
from alisa.lab.bench.decode import decode_case
from alisa.lab.bench.kernels import make_record
from alisa.lab.bench.remote.measured import (
    Clock,
    EngineJob,
    finish,
)
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_for, device_cap_within, device_tokens, run_batch
from alisa.lab.bench.stamp import current_stamp
from alisa.model.loader import random_decoder
from alisa.outputs import StepRecord
from alisa.planner.footprint import activation_bytes, row_bytes
from alisa.scheduler.placement.file import schedule_from
from alisa.spec import ModelSpec, Rope

RESERVE_BYTES = 512 << 20
"""Of the device's memory, left for cuBLAS and what torch's allocator cannot join."""
CALLS = 20
"""Of a kernel in a row: starting one takes as long as a small one runs."""


def limit_memory(device: torch.device, num_bytes: int | None) -> None:
    """Torch cannot take more than this of the device."""
    if device.type == "cuda" and num_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), device)


def peak_device_bytes(device: torch.device) -> int | None:
    """Most that torch's allocator held; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def ours(job: EngineJob) -> None:
    """Measure one way to run this package's engine."""
    options = job.options
    device, dtype = torch.device(options["device"]), getattr(torch, job.dtype)
    limit_memory(device, options["device_memory_bytes"])
    # By hand: a GPU machine may lack the library that checks such values (`alisa.records.structure`).
    rope = job.shape["rope"]
    spec = ModelSpec(**{**job.shape, "rope": rope and Rope(**rope)})
    decoder = random_decoder(spec, dtype, device, job.seed)
    kv_dtype = options.get("kv_dtype", "auto")
    token_bytes = spec.num_layers * row_bytes(spec, job.dtype if kv_dtype == "auto" else kv_dtype)
    num_tokens = job.batch * job.longest
    config = EngineConfig(
        policy=options["policy"],
        sparsity=options["sparsity"],
        kv_dtype=kv_dtype,
        kv_disk_memory=0,
        max_num_seqs=job.batch,
    )
    config = batch_config(config, list(map(len, job.prompts)), job.output_len)
    run_spec = RunSpec(config, CacheOptions(host_bytes=2 * num_tokens * token_bytes))
    need = room = device_cap_for(decoder, run_spec, num_tokens)
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device) + RESERVE_BYTES
        taken += activation_bytes(spec, job.dtype, job.batch, min(1024, num_tokens))
        room = max(1, min(need, options["device_memory_bytes"] - taken))
    elif job.kv_budget_bytes is not None:
        room = device_cap_within(decoder, run_spec, job.kv_budget_bytes)
    schedule = options.get("schedule")
    if schedule == "static":  # as FlexGen would be set: what fits stays, the rest lies below from the beginning
        fitting = device_tokens(decoder, run_spec, room) / num_tokens
        schedule = {"schedule": "static", "offload_ratio": round(max(0.0, 1 - 0.9 * fitting), 3)}
    placement = None if schedule is None else schedule_from(schedule)
    run_spec = RunSpec(replace(config, kv_device_memory=room), replace(run_spec.options, placement=placement))

    def generate(job: EngineJob) -> tuple[Clock, dict[str, object], int]:
        clock = Clock(len(job.prompts))

        def on_step(record: StepRecord) -> None:
            if not record.prefill:
                clock.step()

        ran = run_batch(decoder, run_spec, job.prompts, job.output_len, on_first=clock.first, on_step=on_step)
        clock.stop()
        return clock, ran.details(), ran.num_output

    generate(job.warm_up())
    clock, details, num_output = generate(job)
    details |= {"peak_device_bytes": peak_device_bytes(device), "kv_cap_bytes": room, "kv_need_bytes": need}
    notes = [f"kernels {choose_backend(device).name}", f"schedule {schedule or 'as the cap demands'}"]
    finish(job, clock, packages=["torch"], num_output=num_output, notes=notes, details=details)


def kernels(job: dict[str, Any]) -> None:
    """Measure decode attention on the device."""
    device = torch.device(job["device"])
    chosen = choose_backend(device)
    outcomes = {}
    for name, values in job["cases"].items():
        case = DecodeCase(**values)
        built = decode_case(case, chosen.attend, device)
        if device.type == "cuda":
            built = replace(built, num_calls=CALLS)
        outcomes[name] = case, time_case(built, job["runs"], device=device)
    record = make_record(current_stamp(), chosen.name, job["runs"], outcomes)
    sys.stdout.write(json.dumps(record | {"status": "ran"}) + "\n")


def main() -> None:
    """Do the stage that the command line names."""
    if sys.argv[1] == "ours":
        ours(EngineJob.read())
    else:
        kernels(json.load(sys.stdin))


if __name__ == "__main__":
    main()
