"""Run every engine on one workload, one after the other, and print what they did side by side.

    python benchmarks/peers/compare.py --shape opt-1.3b --batch 16 --prompt-len 128 --output-len 512

Standard library only. Every engine runs in a process of its own, in the environment that `make peer-NAME` set up; one
whose environment is missing is named and left out. Each record, also that of an engine which cannot do the work here,
is appended to `benchmarks/results/peers.jsonl`. Nothing else should run on the machine meanwhile; `others_cpu_share` in
a record says how much did.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from workload import Run, ended, parser, run_of

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "peers.jsonl"
TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True)
class Engine:
    """How one row of the table is made.

    Args:
        environment: name under `.peers`, or `alisa` for this project's own.
        driver: the script beside this one.
        options: what makes this variant.
    """

    environment: str
    driver: str
    options: tuple[str, ...] = ()


ENGINES = {
    "alisa-dense": Engine("alisa", "alisa_engine.py", ("--policy", "dense")),
    "alisa-swa-0.8": Engine("alisa", "alisa_engine.py", ("--policy", "swa", "--sparsity", "0.8")),
    "transformers-dynamic": Engine("transformers", "transformers_engine.py", ("--cache", "dynamic")),
    "transformers-static": Engine("transformers", "transformers_engine.py", ("--cache", "static")),
    "transformers-quanto-int4": Engine("transformers", "transformers_engine.py", ("--cache", "quanto-int4")),
    "transformers-hqq-int4": Engine("transformers", "transformers_engine.py", ("--cache", "hqq-int4")),
    "transformers-offloaded": Engine("transformers", "transformers_engine.py", ("--cache", "offloaded")),
    "vllm": Engine("vllm", "vllm_engine.py"),
    "openvino-fp16": Engine("openvino", "openvino_engine.py", ("--variant", "fp16")),
    "openvino-evict": Engine("openvino", "openvino_engine.py", ("--variant", "evict")),
    "openvino-int8": Engine("openvino", "openvino_engine.py", ("--variant", "int8")),
    "kvpress": Engine("kvpress", "kvpress_engine.py"),
    "llamacpp": Engine("llamacpp", "llamacpp_engine.py"),
}
NEED_A_GPU = {
    "flexgen": "FlexGen 0.1.8 computes on CUDA devices only; the CPU is a place to keep weights and rows for it",
}
"""Engines without a driver for the CPU, and why: they have a row all the same."""


def python_of(environment: str) -> Path:
    """The interpreter of an environment."""
    if environment == "alisa":
        return Path(sys.executable)
    return Path(".peers") / environment / "bin" / "python"


def measure(name: str, run: Run) -> dict[str, Any]:
    """The record of one engine; a driver that fails has one too, with the last line that it wrote."""
    workload = run.workload
    if name in NEED_A_GPU:
        return ended(name, workload, run.threads, "unavailable", NEED_A_GPU[name])
    engine = ENGINES[name]
    command = [str(python_of(engine.environment)), str(HERE / engine.driver), *engine.options]
    command += ["--shape", workload.shape, "--batch", str(workload.batch), "--prompt-len", str(workload.prompt_len)]
    command += ["--output-len", str(workload.output_len), "--seed", str(workload.seed)]
    command += ["--models", str(run.model.parent), "--threads", str(run.threads)]
    # Most engines read the number of threads from here before their own options are looked at.
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ended(name, workload, run.threads, "failed", f"not done after {TIMEOUT_S} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return ended(name, workload, run.threads, "failed", f"exit status {done.returncode}: {last}")


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    if record["status"] != "ran":
        return f"{record['engine']:26}{record['status']}: {record['reason']}"
    decode = record["decode_tokens_per_s"]
    return (
        f"{record['engine']:26}{record['tokens_per_s']:10.1f}{decode if decode else float('nan'):10.1f}"
        f"{record['prefill_s']:10.2f}{record['peak_rss_bytes'] / 2**30:10.1f}"
        f"{record['others_cpu_share']:10.1%}"
    )


class OthersWatch:
    """Share of the cores that processes other than our children use, from construction on."""

    def __init__(self) -> None:
        self._start = (perf_counter(), _busy_seconds(), _children_seconds())

    def share(self) -> float:
        """0 for a machine of one's own; the driver must have ended."""
        wall, busy, own = (
            now - then
            for now, then in zip((perf_counter(), _busy_seconds(), _children_seconds()), self._start, strict=True)
        )
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """Time that all cores together have worked, or were taken by a hypervisor, since the start of the machine."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, _idle, _wait, irq, soft_irq, steal, *_ = map(int, first.split()[1:])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_model(run: Run) -> None:
    """Write the checkpoint if it is not there yet."""
    if not (run.model / "model.safetensors").exists():
        command = [sys.executable, str(HERE / "make_model.py"), "--shape", run.workload.shape]
        subprocess.run([*command, "--models", str(run.model.parent)], check=True, stdout=sys.stderr)


def options() -> argparse.ArgumentParser:
    """The shared options and which engines to run."""
    result = parser(__doc__)
    names = [*ENGINES, *NEED_A_GPU]
    result.add_argument("--engines", nargs="+", choices=names, default=names, metavar="ENGINE", help=", ".join(names))
    result.add_argument("--results", type=Path, default=RESULTS, help="file that the records are appended to")
    return result


def main() -> None:
    """Run the engines and print the table."""
    args = options().parse_args()
    run = run_of(args)
    make_model(run)
    print(f"{'engine':26}{'tokens/s':>10}{'decode/s':>10}{'first, s':>10}{'peak GiB':>10}{'others':>10}", flush=True)
    for name in args.engines:
        environment = ENGINES[name].environment if name in ENGINES else "alisa"
        if not python_of(environment).exists():
            print(f"{name:26}no environment; make peer-{environment}", flush=True)
            continue
        others = OthersWatch()
        record = measure(name, run)
        if record["status"] == "ran":
            record["others_cpu_share"] = round(others.share(), 3)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(row(record), flush=True)


if __name__ == "__main__":
    main()
