"""Two checkouts of this project on the same work, in turns: is one of them faster, and are the tokens the same?

    python benchmarks/compare_versions.py ../alisa-0.1 . --record benchmarks/results/versions.jsonl
    python benchmarks/compare_versions.py ../alisa-0.1 . --workload embedded-b8 --policy dense --rounds 5

Each checkout runs with its own interpreter (`CHECKOUT/.venv/bin/python` unless another is given), in a new process for
every run, and the order changes from round to round. Only what every version has is used: `LLM(model, policy=...)` and
`generate`. A run is timed twice, with one output token and with all of them: the first is reading the prompts, the
difference is decoding. Weights are random except in the embedded model and in one that is given. A ratio above 1: the
second checkout is faster. The last line of the output for each case is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from recording import tell

from alisa.lab.bench.checkpoint import is_written, write_checkpoint
from alisa.lab.bench.others import QUIET_SHARE, OthersMeter, wait_for_quiet
from alisa.lab.bench.shapes import SHAPES
from alisa.lab.bench.stamp import checkout_commit, current_stamp
from alisa.machine import num_cpus

WORKER = """
import hashlib, json, sys
from time import perf_counter
import torch
job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
from alisa import LLM, SamplingParams

llm = LLM(job["model"], policy=job["policy"], sparsity=job["sparsity"])

def run(num_tokens):
    started = perf_counter()
    outputs = llm.generate(job["prompts"], SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    seconds = perf_counter() - started
    ids = [list(output.token_ids) for output in outputs]
    assert all(len(one) == num_tokens for one in ids), "every prompt gets all its tokens"
    return seconds, ids

run(3)
prefill_s, _ = run(1)
wall_s, ids = run(job["output_len"])
tokens = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
print(json.dumps({"prefill_s": prefill_s, "wall_s": wall_s, "tokens": tokens}))
"""
"""What runs in each checkout: a job on standard input, one result on standard output."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of random ids that arrive together."""

    shape: str | None
    """Random weights of this shape; None: the embedded model."""
    batch: int
    prompt_len: int
    output_len: int


WORKLOADS = {
    "opt-1.3b-b1": Workload(shape="opt-1.3b", batch=1, prompt_len=128, output_len=64),
    "opt-1.3b-b16": Workload(shape="opt-1.3b", batch=16, prompt_len=128, output_len=64),
    "llama-1.1b": Workload(shape="llama-1.1b", batch=1, prompt_len=1024, output_len=128),
    "long-b1": Workload(shape="llama-1.1b", batch=1, prompt_len=3000, output_len=64),
    "embedded-b8": Workload(shape=None, batch=8, prompt_len=128, output_len=256),
    "tiny": Workload(shape="llama-tiny", batch=2, prompt_len=16, output_len=8),
}
FEWEST_IDS = 1024
"""All vocabularies have so many tokens; the first ten may be special ones."""
TOLERANCE = 0.02
"""A median that is slower by more is reported."""


@dataclass(frozen=True)
class Version:
    """One of the two."""

    checkout: Path
    python: Path

    @classmethod
    def of(cls, checkout: Path, python: Path | None) -> Version:
        """The checkout with the interpreter that was given, or its own."""
        found = cls(checkout.resolve(), python or checkout.resolve() / ".venv" / "bin" / "python")
        if not found.python.exists():
            sys.exit(f"{found.python} is not there; make .venv/.ready-core in the checkout, or give --python.")
        return found

    def describe(self) -> dict[str, Any]:
        """What a record says about it."""
        return {"commit": checkout_commit(self.checkout / "src" / "alisa")}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """One measurement in a process of its own."""
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(self.python), "-c", WORKER],
            input=json.dumps(job),
            env=environment,
            cwd=self.checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{self.checkout} failed:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        num_decoded = len(job["prompts"]) * (job["output_len"] - 1)
        return result | {"decode_tokens_per_s": num_decoded / (result["wall_s"] - result["prefill_s"])}


def make_job(workload: Workload, policy: str, args: argparse.Namespace) -> dict[str, Any]:
    """What both are asked; the checkpoint is there."""
    model = None if args.model is None else str(args.model.resolve())
    if model is None and workload.shape is not None:
        directory = args.models / workload.shape
        if not is_written(directory):
            write_checkpoint(SHAPES[workload.shape], directory)
        model = str(directory.resolve())
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(10, FEWEST_IDS) for _ in range(workload.prompt_len)] for _ in range(workload.batch)]
    return {
        "model": model,
        "policy": policy,
        "sparsity": args.sparsity,
        "prompts": prompts,
        "output_len": workload.output_len,
        "threads": args.threads,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and ends."""
    quartiles = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": quartiles, "min": min(values), "max": max(values), "all": values}


def compare(name: str, policy: str, versions: tuple[Version, Version], args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one workload with one policy."""
    workload = WORKLOADS[name]
    job = make_job(workload, policy, args)
    results: list[list[dict[str, Any]]] = [[], []]
    meter = OthersMeter()
    for number in range(args.rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            if args.patience > 0:
                wait_for_quiet(args.patience)
            results[which].append(versions[which].run(job))
            print(f"  round {number + 1}, {'ab'[which]}: {results[which][-1]['decode_tokens_per_s']:.2f} tokens/s")
    figures = {}
    for figure, better in (("decode_tokens_per_s", 1), ("prefill_s", -1)):
        a, b = ([result[figure] for result in found] for found in results)
        ratio = (median(b) / median(a)) ** better
        figures[figure] = {"a": spread(a), "b": spread(b), "ratio": ratio}
        apart = min(b) > max(a) or max(b) < min(a)
        verdict = "slower" if ratio < 1 - TOLERANCE else "as fast or faster"
        print(
            f"{name}, {policy}, {figure}: a {median(a):.3f} ({min(a):.3f} to {max(a):.3f}), b {median(b):.3f} "
            f"({min(b):.3f} to {max(b):.3f}), ratio {ratio:.3f}: {verdict}{'' if apart else ', rounds overlap'}"
        )
    same_tokens = len({result["tokens"] for found in results for result in found}) == 1
    others_share = meter.share()
    print(f"  {'equal' if same_tokens else 'DIFFERENT'} tokens; other programs took {others_share:.0%}")
    if others_share > QUIET_SHARE:
        print("  these figures are not to be relied on: the machine was busy")
    return {
        "benchmark": "compare_versions",
        "workload": name,
        **asdict(workload),
        **({} if args.model is None else {"model": args.model.name}),
        "policy": policy,
        "sparsity": args.sparsity,
        "rounds": args.rounds,
        "versions": {label: version.describe() for label, version in zip("ab", versions, strict=True)},
        "figures": figures,
        "same_tokens": same_tokens,
        "others_share": round(others_share, 4),
        "stamp": asdict(replace(current_stamp(), num_threads=args.threads)),
    }


def main() -> None:
    """Every workload with every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="the checkout to compare with")
    parser.add_argument("b", type=Path, help="the checkout that is asked about")
    parser.add_argument("--python", nargs=2, type=Path, metavar=("A", "B"), help="their interpreters")
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=WORKLOADS,
        default=[name for name in WORKLOADS if name not in ("tiny", "long-b1")],
    )
    parser.add_argument("--policy", nargs="+", default=["dense", "sketch"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=max(1, int(num_cpus())))
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for other programs to be quiet")
    parser.add_argument("--model", type=Path, help="a checkpoint that both can read, instead of the workload's own")
    parser.add_argument("--models", type=Path, default=Path(".peers/models"), help="where random weights are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    pythons = args.python or (None, None)
    versions = Version.of(args.a, pythons[0]), Version.of(args.b, pythons[1])
    for name in args.workload:
        for policy in args.policy:
            record = compare(name, policy, versions, args)
            tell(record, args.record)


if __name__ == "__main__":
    main()
