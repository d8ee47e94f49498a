"""vLLM on the CPU, driven step by step through its engine.

    .peers/vllm/bin/python benchmarks/peers/vllm_engine.py

Set up for its best here: bfloat16, one OpenMP thread bound to each core, room in the cache for the whole batch, all
prompts in one pass, no prefix caching, no tokenizer. Its core runs in a process of its own, which is vLLM's default: it
starts that one with the OpenMP library that its thread binding needs (decode is a tenth slower in one process). Intel's
OpenMP in place of torch's was tried and is slower still. The peak is that of both processes together.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import TYPE_CHECKING

from workload import Run, Timing, Workload, finish, parser, run_of

if TYPE_CHECKING:
    from vllm import LLM

KV_SPACE_GIB = 3
"""Enough for 16 sequences of 640 tokens of OPT-1.3B (1.9 GiB) and of 1280 tokens of the LLaMA shape (0.4 GiB)."""


def prepare(threads: int) -> None:
    """Set what vLLM reads from the environment; before it is imported."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_SPACE_GIB)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # the record is the last line of standard output
    os.environ["HF_HUB_OFFLINE"] = "1"


def generate(llm: LLM, workload: Workload) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=workload.output_len,
        min_tokens=workload.output_len,
        ignore_eos=True,
        detokenize=False,
    )
    engine = llm.llm_engine
    start = perf_counter()
    for index, ids in enumerate(workload.prompts()):
        engine.add_request(f"{workload.seed}-{index}", {"prompt_token_ids": ids}, params)
    counts: dict[str, int] = {}
    prefill_s = 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if not prefill_s and len(counts) == workload.batch:
            prefill_s = perf_counter() - start
    return Timing(perf_counter() - start, prefill_s), sum(counts.values())


def measure(run: Run) -> None:
    """Print the record."""
    from vllm import LLM

    workload = run.workload
    llm = LLM(
        model=str(run.model),
        dtype=workload.dtype,
        skip_tokenizer_init=True,
        max_model_len=workload.prompt_len + workload.output_len,
        max_num_seqs=workload.batch,
        max_num_batched_tokens=max(2048, workload.prompt_len + workload.output_len),
        enable_prefix_caching=False,
        seed=workload.seed,
    )
    generate(llm, workload.warm_up())
    timing, num_output = generate(llm, workload)
    notes = ["bfloat16 weights and KV rows", f"VLLM_CPU_KVCACHE_SPACE={KV_SPACE_GIB}", "up to 2048 tokens in a pass"]
    finish("vllm", run, timing, packages=["vllm-cpu", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure."""
    run = run_of(parser(__doc__).parse_args())
    prepare(run.threads)
    measure(run)


if __name__ == "__main__":
    main()
