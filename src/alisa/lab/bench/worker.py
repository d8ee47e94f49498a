"""The driver of this package's own engine: a job on standard input, one result on standard output.

python -m alisa.lab.bench.worker < job.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from alisa.config import EngineConfig
from alisa.engine.builder import CacheOptions
from alisa.kernels.choose import choose_backend
from alisa.lab.bench.engines import OwnOptions
from alisa.lab.bench.remote.measured import Clock, EngineJob, finish
from alisa.lab.bench.session import (
    RunResult,
    RunSpec,
    batch_config,
    device_cap_within,
    kv_dtype_of,
    run_batch,
    run_turns,
)
from alisa.model.choose_linear import choose_linear
from alisa.model.decoder import Decoder
from alisa.model.stored import open_model
from alisa.outputs import StepRecord
from alisa.scheduler.placement.file import schedule_from


def run_spec_of(job: EngineJob, options: OwnOptions, decoder: Decoder) -> RunSpec:
    """How the job is to be run: with a budget, what K and V take beyond it goes to disk; without, all stays here."""
    tiers = job.kv_budget_bytes is not None or options.schedule is not None
    config = EngineConfig(
        policy=options.policy,
        sparsity=options.sparsity,
        weight_dtype=options.weight_dtype,
        kv_dtype=options.kv_dtype,
        kv_disk_memory=None if tiers else 0,
        kv_disk_path=None if options.disk_path is None else Path(options.disk_path),
        max_num_seqs=job.batch,
    )
    run_spec = RunSpec(
        batch_config(config, [job.longest - job.output_len] * len(job.prompts), job.output_len),
        CacheOptions(
            overlap=options.overlap,
            prefetch=options.prefetch,
            placement=None if options.schedule is None else schedule_from(options.schedule),
        ),
    )
    if job.kv_budget_bytes is None:
        return run_spec
    cap = device_cap_within(decoder, run_spec, job.kv_budget_bytes)
    return replace(run_spec, config=replace(run_spec.config, kv_device_memory=cap))


def generate(decoder: Decoder, run_spec: RunSpec, job: EngineJob) -> tuple[Clock, RunResult]:
    """Run the job."""
    clock = Clock(len(job.prompts))

    def on_step(record: StepRecord) -> None:
        if not record.prefill:
            clock.step()

    if job.turns:
        ran = run_turns(
            decoder, run_spec, job.prompts, job.output_len, on_turn=clock.turn, on_first=clock.first, on_step=on_step
        )
    else:
        ran = run_batch(decoder, run_spec, job.prompts, job.output_len, on_first=clock.first, on_step=on_step)
    clock.stop()
    return clock, ran


def main() -> None:
    """Measure."""
    job = EngineJob.read()
    torch.set_num_threads(job.threads)
    options = OwnOptions.of(job.options)
    device = torch.device("cpu")
    dtype = getattr(torch, job.dtype)
    linears = choose_linear(options.weight_dtype, dtype, device)
    decoder = open_model(Path(job.model)).decoder(dtype, device, linears=linears)
    run_spec = run_spec_of(job, options, decoder)
    generate(decoder, run_spec, job.warm_up())
    clock, ran = generate(decoder, run_spec, job)
    kernels = choose_backend(decoder.device)
    weights = job.dtype if options.weight_dtype == "float" else options.weight_dtype
    notes = [f"{weights} weights, {kv_dtype_of(decoder, run_spec.config)} KV rows", f"kernels {kernels.name}"]
    notes += ["prefix cache"] if job.turns else []
    notes += [] if options.prefetch else ["no prefetching"]
    notes += [] if options.overlap else ["no overlap of moves with arithmetic"]
    finish(job, clock, packages=["alisa", "torch"], num_output=ran.num_output, notes=notes, details=ran.details())


if __name__ == "__main__":
    main()
