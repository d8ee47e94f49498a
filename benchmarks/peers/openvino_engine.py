"""OpenVINO GenAI: its continuous batching pipeline over a model exported by optimum-intel.

Started by `alisa bench run` (src/alisa/lab/bench/remote/measured.py). Set up for its best here: inference precision
bfloat16, as many threads as cores, all prompts of the batch in one pass, a cache allocated at once, no prefix caching.
Precision of the KV rows stays the plugin's choice (8 bits, which the result states) unless the option `kv_precision`
asks for another. Variants (`variant`) are the weights of the export (fp16, which become bfloat16 in memory, int8, or
int4 in groups of 64 inputs) and `evict`, its own sparse cache: 32 first tokens, 64 recent ones, and 64 between them
that received most attention. The model is exported once; a GGUF file is decoded to a checkpoint in bfloat16 for that,
by transformers. Under a memory budget the cache has as many blocks as it pays for. A conversation finds what was said
before by the prefix cache.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
import torch
from measured import Clock, EngineJob, finish, unavailable
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 32
"""Tokens of a cache block on the CPU; sizes of the eviction must be multiples of it."""


GROUP = 64
"""Inputs that share a scale in 4 bits: the most that divides the widths of all models here."""


def decoded(file: Path, scratch: Path) -> Path:
    """Directory of the checkpoint that transformers makes of a GGUF file, written if it is not there yet."""
    directory = scratch / f"{file.stem}-bf16"
    if not (directory / "model.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
        model.save_pretrained(directory)
    return directory


def export(model: Path, scratch: Path, weights: str) -> Path:
    """Directory of the exported model, written if it is not there yet."""
    directory = scratch / f"{model.name.removesuffix('.gguf')}-openvino-{weights}"
    if not (directory / "openvino_model.bin").exists():
        source = decoded(model, scratch) if model.is_file() else model
        tool = Path(sys.executable).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", weights]
        options += ["--group-size", str(GROUP), "--ratio", "1.0"] if weights == "int4" else []
        command = [str(tool), "export", "openvino", "--model", str(source), *options, str(directory)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return directory


def row_bytes(job: EngineJob, precision: str) -> int:
    """K and V of one token over all layers; rows of 8 bits carry a scale and a zero point in float32 for each head."""
    shape = job.shape
    head = shape["head_dim"] + 8 if precision == "u8" else 2 * shape["head_dim"]
    return 2 * shape["num_layers"] * shape["num_kv_heads"] * head


def scheduler(job: EngineJob, *, evict: bool, batched_tokens: int, num_blocks: int) -> genai.SchedulerConfig:
    """Room for this work and no more."""
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = batched_tokens
    config.max_num_seqs = job.batch
    config.enable_prefix_caching = job.turns
    config.num_kv_blocks = num_blocks
    if evict:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK,
            recent_size=2 * BLOCK,
            max_cache_size=5 * BLOCK,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return config


def greedy(job: EngineJob) -> genai.GenerationConfig:
    """The likeliest tokens, as many as are asked for."""
    config = genai.GenerationConfig()
    config.max_new_tokens = job.output_len
    config.min_new_tokens = job.output_len
    config.ignore_eos = True
    config.do_sample = False
    return config


def generate(pipeline: genai.ContinuousBatchingPipeline, job: EngineJob) -> tuple[Clock, int]:
    """Run the job; its times and the number of tokens that came."""
    config = greedy(job)
    prompts = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in job.prompts]
    clock = Clock(len(prompts))
    handles = [pipeline.add_request(index, ids, config) for index, ids in enumerate(prompts)]
    counts = [0] * len(handles)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        started = counts.count(0)
        for index, handle in enumerate(handles):
            if handle.can_read():
                counts[index] += sum(len(output.generated_ids) for output in handle.read().values())
                clock.first(index)
        if counts.count(0) == started:
            clock.step()
    clock.stop()
    return clock, sum(counts)


def converse(pipeline: genai.ContinuousBatchingPipeline, job: EngineJob) -> tuple[Clock, int]:
    """Hold the conversation; its times and the number of tokens that came."""
    config = greedy(job)
    clock, said, num_output = Clock(len(job.prompts)), [], 0
    for index, ids in enumerate(job.prompts):
        clock.turn()
        said += ids
        handle = pipeline.add_request(index, ov.Tensor(np.array([said], dtype=np.int64)), config)
        answer: list[int] = []
        while pipeline.has_non_finished_requests():
            pipeline.step()
            started = bool(answer)
            if handle.can_read():
                answer += [token for output in handle.read().values() for token in output.generated_ids]
                clock.first(index)
            if started:
                clock.step()
        said += answer
        num_output += len(answer)
    clock.stop()
    return clock, num_output


def measure(job: EngineJob) -> None:
    """Print the result of one variant."""
    variant, asked = job.options.get("variant", "fp16"), job.options.get("kv_precision")
    batched_tokens = job.options.get("batched_tokens", 2048)
    weights = variant if variant in ("int8", "int4") else "fp16"
    directory = export(Path(job.model), Path(job.scratch), weights)
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    properties |= {"INFERENCE_NUM_THREADS": str(job.threads)}
    if asked:
        properties["KV_CACHE_PRECISION"] = asked
    precision = asked or default_kv_precision(directory, properties)
    num_blocks = job.batch * (-(-job.longest // BLOCK) + 1)
    if job.kv_budget_bytes is not None:
        num_blocks = min(num_blocks, job.kv_budget_bytes // (BLOCK * row_bytes(job, precision)))
    if num_blocks < -(-job.longest // BLOCK) and variant != "evict":
        unavailable(
            f"the budget is {num_blocks} blocks of {BLOCK} tokens, and one sequence comes to {job.longest} tokens"
        )
        return
    config = scheduler(job, evict=variant == "evict", batched_tokens=batched_tokens, num_blocks=num_blocks)
    pipeline = genai.ContinuousBatchingPipeline(str(directory), config, "CPU", properties)
    run = converse if job.turns else generate
    run(pipeline, job.warm_up())
    clock, num_output = run(pipeline, job)
    notes = [
        f"weights exported as {weights}, inference precision bf16",
        f"KV precision {precision}" + ("" if asked else ", the plugin's choice"),
        f"{num_blocks} blocks of {BLOCK} tokens, up to {batched_tokens} tokens in a pass",
    ]
    if variant == "evict":
        notes.append("cache eviction down to 160 tokens: 32 first, 64 recent, 64 by attention")
    packages = ["openvino", "openvino-genai", "optimum-intel"]
    finish(job, clock, packages=packages, num_output=num_output, notes=notes)


def default_kv_precision(directory: Path, properties: dict[str, str]) -> str:
    """What the CPU plugin says it stores KV rows in, asked of a compiled model of no size."""
    parameter = ov.opset13.parameter([1], np.float32)
    compiled = ov.Core().compile_model(ov.Model([ov.opset13.relu(parameter)], [parameter]), "CPU", properties)
    return compiled.get_property("KV_CACHE_PRECISION").get_type_name()


def main() -> None:
    """Measure one variant."""
    measure(EngineJob.read())


if __name__ == "__main__":
    main()
