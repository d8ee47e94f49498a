"""vLLM on the CPU, driven step by step through its engine.

Started by `alisa bench run` (src/alisa/lab/bench/remote/measured.py). Set up for its best here: bfloat16, one OpenMP
thread bound to each core, room in the cache for the whole batch (or what the budget allows), all prompts in one pass,
no prefix caching, no tokenizer. Its core runs in a process of its own, which is vLLM's default: it starts that one with
the OpenMP library that its thread binding needs (decode is a tenth slower in one process). Intel's OpenMP in place of
torch's was tried and is slower still. The peak is that of both processes together.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from measured import Clock, EngineJob, finish

if TYPE_CHECKING:
    from vllm import LLM

BLOCK = 128
"""Tokens of its largest block: a sequence may end at the beginning of one."""


def prepare(threads: int) -> None:
    """Set what vLLM reads from the environment; before it is imported."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # the result is the last line of standard output
    os.environ["HF_HUB_OFFLINE"] = "1"


def generate(llm: LLM, job: EngineJob, name: str) -> tuple[Clock, int]:
    """Run the job; its times and the number of tokens that came."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=job.output_len,
        min_tokens=job.output_len,
        ignore_eos=True,
        detokenize=False,
    )
    engine = llm.llm_engine
    clock = Clock(len(job.prompts))
    for index, ids in enumerate(job.prompts):
        engine.add_request(f"{name}-{index}", {"prompt_token_ids": ids}, params)
    counts: dict[int, int] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        started = len(counts)
        for output in outputs:
            # The engine may append to the name that it was given.
            index = int(output.request_id.split("-")[1])
            clock.first(index)
            counts[index] = len(output.outputs[0].token_ids)
        if len(counts) == started:
            clock.step()
    clock.stop()
    return clock, sum(counts.values())


def measure(job: EngineJob) -> None:
    """Print the result."""
    from vllm import LLM

    need = (job.batch * (job.longest + BLOCK) + BLOCK) * job.kv_token_bytes
    room = need if job.kv_budget_bytes is None else job.kv_budget_bytes
    tokens = max(2048, job.longest)
    llm = LLM(
        model=job.model,
        dtype=job.dtype,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=room,
        max_model_len=job.longest,
        max_num_seqs=job.batch,
        max_num_batched_tokens=tokens,
        enable_prefix_caching=False,
        seed=job.seed,
    )
    generate(llm, job.warm_up(), "warm")
    clock, num_output = generate(llm, job, "run")
    notes = [f"{job.dtype} weights and KV rows", f"kv_cache_memory_bytes={room}", f"up to {tokens} tokens in a pass"]
    finish(job, clock, packages=["vllm-cpu", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    job = EngineJob.read()
    prepare(job.threads)
    measure(job)


if __name__ == "__main__":
    main()
