"""The work that every engine gets, and the record that every engine prints. Standard library only.

Each driver runs in an environment of its own, so this file imports nothing that one of them may lack. A driver parses
the workload from its command line, runs it once unmeasured for warmth and once measured, and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIRST_ORDINARY_ID = 10
"""Token ids below are left to the models' special tokens."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; `family` is the `model_type` of its Hugging Face config."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    max_positions: int


SHAPES = {
    "opt-1.3b": Shape("opt", 24, 2048, 32, 32, 8192, 50272, 2048),
    "llama-1.1b": Shape("llama", 22, 2048, 32, 4, 5632, 32000, 2048),
    "opt-tiny": Shape("opt", 2, 128, 4, 4, 512, 1024, 512),
    "llama-tiny": Shape("llama", 2, 128, 4, 2, 384, 1024, 512),
}
"""The two shapes that are compared (OPT-1.3B and TinyLlama-1.1B), and two on which a driver is tried in seconds."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` prompts of random ids that arrive together, each continued greedily by exactly `output_len` tokens."""

    shape: str
    batch: int
    prompt_len: int
    output_len: int
    seed: int = 0
    dtype: str = "bfloat16"

    def prompts(self) -> list[list[int]]:
        """Token ids, the same on every machine and in every environment."""
        rng = random.Random(f"{self.seed} {self.shape} {self.batch} {self.prompt_len}")
        vocab_size = SHAPES[self.shape].vocab_size
        return [
            [rng.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(self.prompt_len)] for _ in range(self.batch)
        ]

    def warm_up(self) -> Workload:
        """The same shapes with other ids and three tokens of output: what a first run costs is not measured."""
        return Workload(self.shape, self.batch, self.prompt_len, 3, self.seed + 1, self.dtype)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a run from the moment the prompts are handed over.

    Args:
        wall_s: until the last token of the last sequence.
        prefill_s: until the last sequence of the batch has its first token.
    """

    wall_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """What a driver is asked to do: the workload, the checkpoint directory and the number of threads."""

    workload: Workload
    model: Path
    threads: int


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all drivers share; a driver adds its own."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--prompt-len", type=int, default=128)
    result.add_argument("--output-len", type=int, default=512)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--models", type=Path, default=Path(".peers/models"), help="where make_model.py writes")
    result.add_argument("--threads", type=int, default=os.cpu_count())
    return result


def run_of(args: argparse.Namespace) -> Run:
    """The run that the shared options describe."""
    workload = Workload(args.shape, args.batch, args.prompt_len, args.output_len, args.seed)
    return Run(workload, args.models / args.shape, args.threads)


def finish(engine: str, run: Run, timing: Timing, *, packages: list[str], num_output: int, notes: list[str]) -> None:
    """Print the record of a measured run as the last line of standard output.

    Args:
        engine: name and variant, as in the table.
        run: what was asked.
        timing: what was measured.
        packages: distributions whose versions belong to the result.
        num_output: tokens that the engine really produced; another number than was asked is an error.
        notes: settings that differ from the engine's defaults, and what else a reader must know.
    """
    workload = run.workload
    asked = workload.batch * workload.output_len
    if num_output != asked:
        raise RuntimeError(f"{engine} produced {num_output} tokens where {asked} were asked for.")
    decode_s = timing.wall_s - timing.prefill_s
    decode_tokens = workload.batch * (workload.output_len - 1)
    result = {
        "status": "ran",
        "tokens_per_s": round(asked / timing.wall_s, 2),
        "wall_s": round(timing.wall_s, 2),
        "prefill_s": round(timing.prefill_s, 3),
        "decode_tokens_per_s": round(decode_tokens / decode_s, 2) if decode_tokens else None,
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    _print_record(engine, workload, run.threads, result | {"versions": versions, "notes": notes})


def unavailable(engine: str, run: Run, reason: str) -> None:
    """Print a record that says why the engine cannot do this work here."""
    _print_record(engine, run.workload, run.threads, {"status": "unavailable", "reason": reason})


def ended(engine: str, workload: Workload, threads: int, status: str, reason: str) -> dict[str, Any]:
    """The record of an engine that gave none itself: `unavailable` or `failed`, and why."""
    return _record(engine, workload, threads, {"status": status, "reason": reason})


def _print_record(engine: str, workload: Workload, threads: int, result: dict[str, Any]) -> None:
    sys.stderr.flush()
    print(json.dumps(_record(engine, workload, threads, result)), flush=True)


def _record(engine: str, workload: Workload, threads: int, result: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": threads, "features": _cpu_features()}
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "benchmark": "peers",
        "engine": engine,
        "workload": asdict(workload),
        **result,
        "machine": machine,
        "time": stamp,
    }


def _cpu_info(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _cpu_model() -> str:
    """Name, family and model: a virtual machine may hide the name."""
    return f"{_cpu_info('model name')} (family {_cpu_info('cpu family')}, model {_cpu_info('model')})"


def _cpu_features() -> list[str]:
    """Those instruction sets that decide how fast bfloat16 is."""
    flags = set(_cpu_info("flags").split())
    return [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]


def _peak_rss_bytes() -> int:
    """Most memory that this process held at once, plus the same of every process below it that still lives."""
    return sum(_high_water_bytes(pid) for pid in (os.getpid(), *_descendants(os.getpid())))


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text(encoding="ascii").split()):
            children += [child, *_descendants(child)]
    return children


def _high_water_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
