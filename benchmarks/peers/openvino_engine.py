"""OpenVINO GenAI: its continuous batching pipeline over a model exported by optimum-intel.

    .peers/openvino/bin/python benchmarks/peers/openvino_engine.py --variant fp16

Set up for its best here: inference precision bfloat16, as many threads as cores, all prompts of the batch in one pass,
a cache allocated at once, no prefix caching. Precision of the KV rows stays the plugin's choice (8 bits, which the
record states) unless `--kv-precision` asks for another. Variants are the weights of the export (fp16, which become
bfloat16 in memory, or int8) and `evict`, its own sparse cache: 32 first tokens, 64 recent ones, and 64 between them
that received most attention. The model is exported once, beside the checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import openvino as ov
import openvino_genai as genai
from workload import Run, Timing, Workload, finish, parser, run_of

BLOCK = 32
"""Tokens of a cache block on the CPU; sizes of the eviction must be multiples of it."""


def export(model: Path, weights: str) -> Path:
    """Directory of the exported model, written if it is not there yet."""
    directory = model.with_name(f"{model.name}-openvino-{weights}")
    if not (directory / "openvino_model.bin").exists():
        tool = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past", "--weight-format", weights]
        command = [str(tool), "export", "openvino", "--model", str(model), *task, str(directory)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return directory


def scheduler(workload: Workload, *, evict: bool, batched_tokens: int) -> genai.SchedulerConfig:
    """Room for exactly this workload."""
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = batched_tokens
    config.max_num_seqs = workload.batch
    config.enable_prefix_caching = False
    blocks = -(-(workload.prompt_len + workload.output_len) // BLOCK) + 1
    config.num_kv_blocks = workload.batch * blocks
    if evict:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK,
            recent_size=2 * BLOCK,
            max_cache_size=5 * BLOCK,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return config


def generate(pipeline: genai.ContinuousBatchingPipeline, workload: Workload) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    config = genai.GenerationConfig()
    config.max_new_tokens = workload.output_len
    config.min_new_tokens = workload.output_len
    config.ignore_eos = True
    config.do_sample = False
    prompts = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in workload.prompts()]
    start = perf_counter()
    handles = [pipeline.add_request(index, ids, config) for index, ids in enumerate(prompts)]
    counts = [0] * len(handles)
    prefill_s = 0.0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for index, handle in enumerate(handles):
            if handle.can_read():
                counts[index] += sum(len(output.generated_ids) for output in handle.read().values())
        if not prefill_s and all(counts):
            prefill_s = perf_counter() - start
    return Timing(perf_counter() - start, prefill_s), sum(counts)


def measure(run: Run, variant: str, kv_precision: str | None, batched_tokens: int) -> None:
    """Print the record of one variant."""
    directory = export(run.model, "int8" if variant == "int8" else "fp16")
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    properties |= {"INFERENCE_NUM_THREADS": str(run.threads)}
    if kv_precision:
        properties["KV_CACHE_PRECISION"] = kv_precision
    config = scheduler(run.workload, evict=variant == "evict", batched_tokens=batched_tokens)
    pipeline = genai.ContinuousBatchingPipeline(str(directory), config, "CPU", properties)
    generate(pipeline, run.workload.warm_up())
    timing, num_output = generate(pipeline, run.workload)
    notes = [
        f"weights exported as {'int8' if variant == 'int8' else 'fp16'}, inference precision bf16",
        f"KV precision {kv_precision or 'of the plugin: ' + default_kv_precision(directory, properties)}",
        f"up to {batched_tokens} tokens in a pass",
    ]
    if variant == "evict":
        notes.append("cache eviction down to 160 tokens: 32 first, 64 recent, 64 by attention")
    name = f"openvino-{variant}" + (f"-kv-{kv_precision}" if kv_precision else "")
    packages = ["openvino", "openvino-genai", "optimum-intel"]
    finish(name, run, timing, packages=packages, num_output=num_output, notes=notes)


def default_kv_precision(directory: Path, properties: dict[str, str]) -> str:
    """What the CPU plugin says it stores KV rows in, asked of a compiled model of no size."""
    parameter = ov.opset13.parameter([1], np.float32)
    compiled = ov.Core().compile_model(ov.Model([ov.opset13.relu(parameter)], [parameter]), "CPU", properties)
    return compiled.get_property("KV_CACHE_PRECISION").get_type_name()


def main() -> None:
    """Measure one variant."""
    options = parser(__doc__)
    options.add_argument("--variant", choices=("fp16", "evict", "int8"), default="fp16")
    options.add_argument("--kv-precision", choices=("u8", "bf16", "f16"))
    options.add_argument("--batched-tokens", type=int, default=2048)
    args = options.parse_args()
    measure(run_of(args), args.variant, args.kv_precision, args.batched_tokens)


if __name__ == "__main__":
    main()
