"""Everything that only a GPU can show, in eight minutes and without a download: `make gpu-check`.

    PYTHONPATH=src python benchmarks/gpu_check.py --output benchmarks/results/gpu.jsonl

1. tests       those marked `gpu`: the Triton kernels on the device, tiers with streams of their own
2. kernels     decode attention against torch and against the device's memory
3. end to end  OPT-6.7B shape, dummy weights, device memory limited to 16 GiB (the paper's V100): this engine dense with
               a fixed split as in FlexGen, sparse with the same split, sparse with three phases, the same with INT8
               rows; Hugging Face transformers with its offloaded cache; FlexGen where it is installed

Every stage is a process with a time limit; when the time is out, the stages that are left are named with that reason.
It needs torch, Triton, numpy, psutil and pytest, and runs from the source tree. `--device cpu` goes through the same
stages without a GPU, on a small shape: that shows whether the flow works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from alisa.lab.bench.cases import (
    CASES,
    DecodeCase,
)
from alisa.lab.bench.remote.measured import EngineJob
from alisa.lab.bench.shapes import SHAPES
from alisa.lab.bench.stamp import current_stamp
from alisa.planner.footprint import kv_token_bytes

ROOT = Path(__file__).parents[1]
REMOTE = ROOT / "src" / "alisa" / "lab" / "bench" / "remote"
OURS = {
    "alisa dense, fixed split": {"policy": "dense", "schedule": "static"},
    "alisa swa, fixed split": {"policy": "swa", "schedule": "static"},
    "alisa swa, three phases": {"policy": "swa"},
    "alisa swa, three phases, INT8 rows": {"policy": "swa", "kv_dtype": "int8"},
}
PEERS = {"transformers, offloaded cache": "transformers_gpu.py", "FlexGen 0.1.8": "flexgen_engine.py"}
MODULES = {"transformers, offloaded cache": "transformers", "FlexGen 0.1.8": "flexgen"}
STAGES = ("tests", "kernels", *OURS, *PEERS)
LIMITS_S = {"tests": 150.0, "kernels": 60.0}
"""Of a stage; the others may take `RUN_LIMIT_S`."""
RUN_LIMIT_S = 120.0
LEAST_S = 10.0
"""With less time left no stage is begun."""
KERNELS = ("bf16-20", "int8-20", "int4-20", "bf16-20-shuffled", "bf16-dense", "bf16-20-gqa", "bf16-20-per-head")

Record = dict[str, Any]


def job_of(args: argparse.Namespace) -> EngineJob:
    """The workload that every engine gets."""
    spec = SHAPES[args.shape]
    rng = random.Random(0)
    prompts = [[rng.randrange(10, spec.vocab_size) for _ in range(args.prompt_len)] for _ in range(args.batch)]
    token_bytes = kv_token_bytes(spec, args.dtype)
    need = args.batch * (args.prompt_len + args.output_len - 1) * token_bytes
    return EngineJob(
        model="",
        shape=asdict(spec),
        prompts=prompts,
        output_len=args.output_len,
        batch=args.batch,
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        seed=0,
        kv_token_bytes=token_bytes,
        kv_budget_bytes=need * 2 // 5 if args.device == "cpu" else None,
        options={"device": args.device, "device_memory_bytes": args.device_memory << 30, "name": args.shape},
    )


def kernels_job(args: argparse.Namespace) -> Record:
    """Cases in full size for a GPU, and smaller ones that a CPU is through with at once."""
    cases = {name: case for name in KERNELS if isinstance(case := CASES[name], DecodeCase)}
    if args.device == "cpu":
        cases = {"bf16-20": replace(cases["bf16-20"], num_seqs=2, num_tokens=64, num_heads=4, num_kv_heads=4)}
    return {"device": args.device, "runs": 9, "cases": {name: asdict(case) for name, case in cases.items()}}


def in_process(command: list[str], job: Record, limit_s: float) -> Record:
    """What the last line of a process says, or why there is none."""
    paths = os.pathsep.join((str(ROOT / "src"), str(REMOTE), str(ROOT / "benchmarks" / "peers")))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *command],
            input=json.dumps(job),
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode == 0 and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    return {"status": "failed", "reason": (done.stderr.strip().splitlines() or lines)[-1]}


def tests(args: argparse.Namespace, limit_s: float) -> Record:
    """Run the tests that need the device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", *args.tests]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done after {limit_s:.0f} s"}
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    status = "ran" if done.returncode == 0 else "failed"
    return {"status": status, "reason": last, "said": last, "failures": failures}


def stage(name: str, args: argparse.Namespace, limit_s: float) -> Record:
    """Do one stage."""
    job, worker = job_of(args), str(ROOT / "benchmarks" / "gpu_worker.py")
    if name == "tests":
        return {"kind": "gpu-tests"} | tests(args, limit_s)
    if name == "kernels":
        return {"kind": "gpu-kernels"} | in_process([worker, "kernels"], kernels_job(args), limit_s)
    if name in OURS:
        options = dict(job.options) | {"sparsity": 0.8} | OURS[name]
        result = in_process([worker, "ours"], asdict(replace(job, options=options)), limit_s)
    elif args.device == "cpu":
        result = {"status": "unavailable", "reason": "it keeps rows off a GPU, and there is none"}
    elif find_spec(MODULES[name]) is None:
        result = {"status": "unavailable", "reason": f"{MODULES[name]} is not installed"}
    else:
        driver = str(ROOT / "benchmarks" / "peers" / PEERS[name])
        result = in_process([driver], asdict(job), limit_s)
    return {"kind": "gpu-run"} | figures(result, job)


def figures(result: Record, job: EngineJob) -> Record:
    """The result with what the table shows."""
    if result["status"] != "ran":
        return result
    prefill_s, wall_s = max(result["first_token_s"]), result["wall_s"]
    asked = len(job.prompts) * job.output_len
    found = {
        "tokens_per_s": asked / wall_s,
        "decode_tokens_per_s": (asked - len(job.prompts)) / (wall_s - prefill_s),
        "wall_s": wall_s,
        "first_token_last_s": prefill_s,
        "peak_device_bytes": result["details"]["peak_device_bytes"],
    }
    return result | {"figures": found}


def told(name: str, record: Record) -> str:
    """One stage on one line."""
    if record["kind"] == "gpu-tests":
        return f"{name:36}{record['reason']}"
    if record["status"] != "ran":
        return f"{name:36}{record['status']}: {record['reason']}"
    if record["kind"] == "gpu-kernels":
        return "\n".join(f"{name} {case['case']:28}{_kernel(case)}" for case in record["cases"])
    values = record["figures"]
    peak = values["peak_device_bytes"]
    details = record["details"]
    moved = f"{details['moved_bytes'] / 1e9:6.1f} GB moved" if "moved_bytes" in details else ""
    return (
        f"{name:36}{values['tokens_per_s']:8.1f} tokens/s, decode {values['decode_tokens_per_s']:8.1f}, first token "
        f"{values['first_token_last_s']:6.2f} s, peak {'-' if peak is None else f'{peak / 2**30:.1f} GiB'} {moved}"
    )


def _kernel(case: Record) -> str:
    kernel = next(timing for timing in case["timings"].values() if timing["role"] == "kernel")
    rivals = ", ".join(f"{role} {factor:.1f}x" for role, factor in case["speedup"].items() if factor is not None)
    return f"{kernel['median_s'] * 1e6:8.1f} us, {case['bandwidth_share']:.0%} of the read bandwidth; {rivals}"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="default: opt-6.7b, opt-tiny on a CPU")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--device-memory", type=int, default=16, metavar="GIB")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH", help="where the tests are")
    parser.add_argument("--output", type=Path, help="append the records to this file")
    args = parser.parse_args(words)
    args.shape = args.shape or ("opt-tiny" if args.device == "cpu" else "opt-6.7b")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "float16")
    return args


def main(words: list[str] | None = None) -> int:
    """Do the stages in order; exit status 0: all that could run did, 1: something failed, 2: there is no GPU."""
    args = parse(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("There is no NVIDIA GPU that this torch can use; alisa doctor says what it sees.", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    common = {
        "device": device,
        "device_memory_bytes": args.device_memory << 30,
        "stamp": asdict(current_stamp()),
        "workload": {key: getattr(args, key) for key in ("shape", "dtype", "batch", "prompt_len", "output_len")},
    }
    print(f"{device}, {args.shape}, batch {args.batch}, {args.prompt_len} + {args.output_len} tokens", flush=True)
    end, failed = monotonic() + 60 * args.minutes, False
    for name in args.stages:
        left = end - monotonic()
        if left < LEAST_S:
            kind = {"tests": "gpu-tests", "kernels": "gpu-kernels"}.get(name, "gpu-run")
            record: Record = {"kind": kind, "status": "skipped", "reason": f"the {args.minutes:g} minutes are over"}
        else:
            record = stage(name, args, min(left, LIMITS_S.get(name, RUN_LIMIT_S)))
        failed |= record["status"] == "failed"
        record = {"kind": record["kind"], "run": name} | common | record
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        print(told(name, record), flush=True)
        for line in record.get("failures", ()):
            print(f"  {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
