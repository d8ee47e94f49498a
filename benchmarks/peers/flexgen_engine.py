"""FlexGen 0.1.8 (`pip install flexgen==0.1.8`): weights, cache and activations split between a GPU and main memory.

Started by `benchmarks/gpu_check.py` (src/alisa/lab/bench/remote/measured.py). Weights are its own dummies and stay on
the device; of the cache there stays the share that fits beside them, the rest lies in pinned main memory from the first
token on. It knows models by name, so the job says which OPT it is.
"""

from __future__ import annotations

import tempfile

import torch
from flexgen.compression import CompressionConfig
from flexgen.flex_opt import DUMMY_WEIGHT, OptLM, Policy
from flexgen.opt_config import get_opt_config
from flexgen.timer import timers
from flexgen.utils import ExecutionEnv
from measured import Clock, EngineJob, finish

ROOM = 0.75
"""Of the memory that weights leave, what the cache may take; activations and the rows on their way need the rest."""


def make_policy(job: EngineJob, cache_percent: int) -> Policy:
    """Everything on the device but the rest of the cache; its default settings otherwise."""
    compression = [CompressionConfig(num_bits=4, group_size=64, group_dim=dim, symmetric=False) for dim in (0, 2)]
    return Policy(
        gpu_batch_size=len(job.prompts),
        num_gpu_batches=1,
        w_gpu_percent=100,
        w_cpu_percent=0,
        cache_gpu_percent=cache_percent,
        cache_cpu_percent=100 - cache_percent,
        act_gpu_percent=100,
        act_cpu_percent=0,
        overlap=True,
        sep_layer=True,
        pin_weight=True,
        cpu_cache_compute=False,
        attn_sparsity=1.0,
        compress_weight=False,
        comp_weight_config=compression[0],
        compress_cache=False,
        comp_cache_config=compression[1],
    )


def measure(job: EngineJob, folder: str) -> None:
    """Print the result."""
    limit = job.options["device_memory_bytes"]
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    config = get_opt_config(job.options["name"])
    need = config.cache_bytes(len(job.prompts), job.longest)
    percent = int(100 * max(0.0, min(1.0, ROOM * (limit - config.model_bytes()) / need)))
    env = ExecutionEnv.create(folder)
    try:
        model = OptLM(config, env, DUMMY_WEIGHT, make_policy(job, percent))
        model.generate(job.warm_up().prompts, max_new_tokens=1)
        timers("generate").reset()
        output = model.generate(job.prompts, max_new_tokens=job.output_len)
        costs = timers("generate").costs
    finally:
        env.close_copy_threads()
    # It has a clock of its own: the prompts, then each step.
    clock = Clock(len(job.prompts))
    clock.first_token_s = [costs[0]] * len(job.prompts)
    clock.step_s = list(costs[1:])
    clock.wall_s = sum(costs)
    num_output = output.size - sum(map(len, job.prompts))
    details = {"peak_device_bytes": torch.cuda.max_memory_reserved()}
    notes = [f"{percent} % of the cache on the device", "float16"]
    finish(job, clock, packages=["flexgen", "torch"], num_output=num_output, notes=notes, details=details)


def main() -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as folder:
        measure(EngineJob.read(), folder)


if __name__ == "__main__":
    main()
