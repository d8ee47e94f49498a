"""This project's own engine through its Python face.

.venv/bin/python benchmarks/peers/alisa_engine.py --policy swa --sparsity 0.8
"""

from __future__ import annotations

from time import perf_counter
from typing import get_args

import torch
from workload import Run, Timing, Workload, finish, parser, run_of

from alisa import LLM, SamplingParams
from alisa.config import DtypeName, KvDtypeName, PolicyName


def generate(llm: LLM, workload: Workload) -> tuple[Timing, int]:
    """Run the workload; its timing and the number of tokens that came."""
    params = SamplingParams(max_tokens=workload.output_len, ignore_eos=True)
    prompts = workload.prompts()
    start = perf_counter()
    outputs = llm.generate(prompts, params)
    wall_s = perf_counter() - start
    prefill_s = max(output.report.first_token_s for output in outputs)
    return Timing(wall_s, prefill_s), sum(len(output.token_ids) for output in outputs)


def measure(run: Run, *, policy: PolicyName, sparsity: float, dtype: DtypeName, kv_dtype: KvDtypeName) -> None:
    """Print the record of one policy."""
    torch.set_num_threads(run.threads)
    llm = LLM(run.model, policy=policy, sparsity=sparsity, dtype=dtype, kv_dtype=kv_dtype, max_batch=run.workload.batch)
    generate(llm, run.workload.warm_up())
    timing, num_output = generate(llm, run.workload)
    settings = llm.describe()
    notes = [f"{name} {settings[name]}" for name in ("dtype", "kv_dtype", "attention", "sparsity")]
    summary = llm.summary()
    notes += [
        f"{part} {getattr(summary, part):.2f} s" for part in ("linear_s", "attention_s", "selection_s", "other_s")
    ]
    name = "-".join(["alisa", policy, *([f"{sparsity:g}"] if policy != "dense" else [])])
    name += "" if kv_dtype == "auto" else f"-kv-{kv_dtype}"
    finish(name, run, timing, packages=["alisa", "torch"], num_output=num_output, notes=notes)


def main() -> None:
    """Measure one policy."""
    options = parser(__doc__)
    options.add_argument("--policy", choices=get_args(PolicyName), default="swa")
    options.add_argument("--sparsity", type=float, default=0.8)
    options.add_argument("--dtype", choices=get_args(DtypeName), default="bfloat16")
    options.add_argument("--kv-dtype", choices=get_args(KvDtypeName), default="auto")
    args = options.parse_args()
    measure(run_of(args), policy=args.policy, sparsity=args.sparsity, dtype=args.dtype, kv_dtype=args.kv_dtype)


if __name__ == "__main__":
    main()
