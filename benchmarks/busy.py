"""Decoding beside busy programs: tokens per second, and how much of its fair share of the processors the engine makes.

A scheduler gives every thread that is ready the same: beside N programs of one thread each, an engine of T threads on P
processors gets P * T / (T + N) of them, and its fair share is that part of what it makes on the quiet machine:
min(1, P / (T + N)) of its quiet speed. More than one hundred percent is possible: fewer threads waste less.

    python benchmarks/busy.py --busy 3 --rounds 5 --output benchmarks/results/busy.jsonl

Variants run in turn, each in a process of its own, with its settings in the environment:

    default   what `alisa` does by itself
    active    the threads of version 0.1: always all of them, and long spins
    passive   all threads, and none of them spins (OMP_WAIT_POLICY)
    one       one thread
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

from alisa import LLM, SamplingParams
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.machine import num_cpus
from alisa.outputs import StepRecord

VARIANTS = {
    "default": {},
    "active": {"OMP_NUM_THREADS": "{threads}", "GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_NUM_THREADS": "{threads}", "OMP_WAIT_POLICY": "passive"},
    "one": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND")


def work(args: argparse.Namespace) -> None:
    """In a process of its own: decode for some seconds; one line of JSON."""
    llm = LLM(args.model, policy=args.policy, max_num_seqs=args.batch)
    prompts = [list(range(5, 5 + args.prompt_len))] * args.batch
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    run(llm, prompts, SamplingParams(max_tokens=4, ignore_eos=True), perf_counter() + args.seconds)
    deadline = perf_counter() + args.seconds
    tokens, decode_s, longest_s = 0, 0.0, 0.0
    while perf_counter() < deadline:
        steps = run(llm, prompts, params, deadline)
        tokens += sum(record.num_tokens for record in steps)
        decode_s += sum(record.wall_s for record in steps)
        longest_s = max([longest_s, *(record.wall_s for record in steps)])
    speed = {"tokens_per_s": tokens / decode_s, "longest_step_s": longest_s}
    print(json.dumps(speed | {"stamp": asdict(current_stamp())}))


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams, deadline: float) -> list[StepRecord]:
    """Decode steps until the requests end or the time is up."""
    with llm.stream(prompts, params) as stream:
        for _ in stream:
            if perf_counter() > deadline:
                break
        return [record for record in stream.report().records if not record.prefill]


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that each keep a processor busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(variant: str, num_busy: int, args: argparse.Namespace, threads: int) -> dict[str, object]:
    """One run of a variant."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {name: value.format(threads=threads) for name, value in VARIANTS[variant].items()}
    command = [sys.executable, __file__, "--work", "--policy", args.policy, "--batch", str(args.batch)]
    command += ["--seconds", str(args.seconds), "--prompt-len", str(args.prompt_len)]
    command += ["--output-len", str(args.output_len), *(["--model", args.model] if args.model else [])]
    with busy_programs(num_busy):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, show, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory; the model inside the package if it is not given")
    parser.add_argument("--policy", default="sketch")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--busy", type=int, default=3, help="programs beside the engine")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, in turn")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    processors = num_cpus()
    threads = max(1, int(processors))
    share = min(1.0, processors / (threads + args.busy))
    runs: dict[tuple[str, int], list[float]] = {}
    for round_number in range(args.rounds):
        for variant in args.variants:
            for num_busy in (0, args.busy):
                meter = OthersMeter()
                found = measure(variant, num_busy, args, threads)
                runs.setdefault((variant, num_busy), []).append(found["tokens_per_s"])
                record = {
                    "benchmark": "busy",
                    "model": Path(args.model).name if args.model else "embedded",
                    "policy": args.policy,
                    "batch": args.batch,
                    "prompt_len": args.prompt_len,
                    "output_len": args.output_len,
                    "variant": variant,
                    "busy": num_busy,
                    "round": round_number,
                    "threads": threads,
                    "fair_share": share if num_busy else 1.0,
                    # The programs of this benchmark and those of anybody else.
                    "others_share": meter.share(),
                    **found,
                }
                if args.output:
                    with args.output.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    best = max(median(speeds) for (_, num_busy), speeds in runs.items() if not num_busy)
    print(f"{processors:g} processors, {threads} threads, {args.busy} busy programs: fair share {share:.0%}")
    print(f"{'variant':<10}{'quiet':>8}{'busy':>8}{'of its fair share':>20}{'of the best one':>18}")
    for variant in args.variants:
        quiet, busy = (median(runs[variant, num_busy]) for num_busy in (0, args.busy))
        own, of_best = busy / (quiet * share), busy / (best * share)
        print(f"{variant:<10}{quiet:>8.1f}{busy:>8.1f}{own:>20.0%}{of_best:>18.0%}")


if __name__ == "__main__":
    main()
