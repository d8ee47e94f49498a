"""Ranking by a key sketch: the native kernel beside the memory it must read, and beside the attention it chooses for.

    python benchmarks/kernels/key_sketch.py --case opt-1.3b-2048 llama-1.1b-1088

Every contender of a case runs once per round, one after the other; the table shows medians and quartiles. Two sketches
are used in turn, and the caches are swept by the bandwidth measurement of each round. The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch

from alisa.kernels.cpu import CpuKernels
from alisa.policy.sketch import sketch_scores

NUM_TABLES = 2


@dataclass(frozen=True)
class Case:
    """One shape: B sequences of S tokens."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_seqs: int = 16
    bits: int = 4
    num_sets: int = 1


CASES = {
    "opt-1.3b-192": Case(192, 32, 32, 64),
    "opt-1.3b-2048": Case(2048, 32, 32, 64),
    "opt-1.3b-2048-2bit": Case(2048, 32, 32, 64, bits=2),
    "opt-1.3b-2048-8bit": Case(2048, 32, 32, 64, bits=8),
    "opt-1.3b-2048-head": Case(2048, 32, 32, 64, num_sets=32),
    "7b-2048": Case(2048, 32, 32, 128),
    "7b-2048-2bit": Case(2048, 32, 32, 128, bits=2),
    "7b-2048-8bit": Case(2048, 32, 32, 128, bits=8),
    "8b-gqa-2048": Case(2048, 32, 8, 128),
    "8b-gqa-16384-b1": Case(16384, 32, 8, 128, num_seqs=1),
    "llama-1.1b-1088": Case(1088, 32, 4, 64),
    "small-512": Case(512, 8, 4, 32),
}


def contenders(case: Case, isa: str | None, with_twin: bool) -> tuple[dict[str, Callable[[int], object]], int]:
    """Functions of the round number, and the bytes of sketch that one call reads."""
    generator = torch.Generator().manual_seed(0)
    kernels = CpuKernels(isa)
    num_rows = case.num_seqs * case.num_tokens
    code_bytes = -(-case.head_dim * case.bits // 8)
    tables = []
    for _ in range(NUM_TABLES):
        codes = torch.empty(num_rows, case.num_kv_heads, code_bytes, dtype=torch.uint8)
        ranges = torch.empty(num_rows, case.num_kv_heads, 2, dtype=torch.float16)
        for ids in torch.arange(num_rows).split(4096):
            keys = torch.randn(len(ids), case.num_kv_heads, case.head_dim, generator=generator)
            kernels.sketch_append(codes, ranges, ids, keys, case.bits)
        tables.append((codes, ranges))
    query = torch.randn(case.num_seqs, case.num_heads, case.head_dim, generator=generator).bfloat16()
    starts = torch.arange(case.num_seqs) * case.num_tokens
    lengths = torch.full((case.num_seqs,), case.num_tokens, dtype=torch.int32)
    rest = (case.bits, starts, lengths, case.num_tokens, case.num_sets)
    new_keys = torch.randn(case.num_seqs, case.num_kv_heads, case.head_dim).bfloat16()
    last = starts + case.num_tokens - 1
    found: dict[str, Callable[[int], object]] = {
        "scores": lambda i: kernels.sketch_scores(query, *tables[i % NUM_TABLES], *rest),
        "append": lambda i: kernels.sketch_append(*tables[i % NUM_TABLES], last, new_keys, case.bits),
    }
    if with_twin:
        found["torch twin"] = lambda i: sketch_scores(query, *tables[i % NUM_TABLES], *rest)
    return found, num_rows * case.num_kv_heads * (code_bytes + 4)


def seconds(function: Callable[[int], object], round_number: int) -> float:
    """Wall time of one call."""
    start = perf_counter()
    function(round_number)
    return perf_counter() - start


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Run one case, print its table, return its record."""
    functions, num_bytes = contenders(case, args.isa, args.twin)
    buffer = torch.ones(1 << 25, dtype=torch.int64)  # 256 MiB
    functions["read"] = lambda _: buffer.sum()
    times: dict[str, list[float]] = {label: [] for label in functions}
    for round_number in range(args.runs + 2):
        for label, function in functions.items():
            elapsed = seconds(function, round_number)
            if round_number >= 2:
                times[label].append(elapsed)
    bandwidth = buffer.nbytes / median(times.pop("read"))
    print(f"\n{name}: {case}\n  sketch {num_bytes / 1e6:.2f} MB, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    record: dict[str, object] = {"case": name, "bytes": num_bytes, "read_bytes_per_s": bandwidth}
    for label, runs in times.items():
        low, middle, high = quantiles(runs, n=4)
        line = f"  {label:10} {middle * 1e3:8.3f} ms [{low * 1e3:.3f}, {high * 1e3:.3f}]"
        if label == "scores":
            line += f"  {num_bytes / middle / 1e9:.1f} GB/s, {num_bytes / middle / bandwidth:.0%} of the bandwidth"
        print(line)
        record[label] = {"median_s": middle, "low_s": low, "high_s": high}
    return record


def main() -> None:
    """Parse the command line and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--isa", choices=("avx512", "avx2", "portable"))
    parser.add_argument("--twin", action="store_true", help="the torch twin too")
    args = parser.parse_args()
    records = [measure(name, CASES[name], args) for name in args.case]
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.processor()}
    isa = CpuKernels(args.isa).isa
    print(
        json.dumps(
            {"kernel": "key_sketch", "isa": isa, "environment": environment, "runs": args.runs, "cases": records}
        )
    )


if __name__ == "__main__":
    main()
