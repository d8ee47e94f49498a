"""Decode attention over selected rows: the native kernel beside dense SDPA, gather + SDPA, its torch twin and memory.

    python benchmarks/kernels/decode_attention.py --case bf16-20 int8-20

Every contender of a case runs once per round, one after the other, so a slow moment of the machine meets all of them;
the table shows medians and the spread (quartiles) over the rounds. Read bandwidth is measured in the same rounds: the
sum of a large buffer by all threads. Arenas are larger than any cache and two are used in turn. The last line is one
JSON record.
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
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from alisa.attention.decode import decode_attention
from alisa.kernels.cpu import CpuKernels
from alisa.kv.codec import make_codec
from alisa.types import RowFormat

NUM_ARENAS = 2
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One shape: B sequences of S tokens, of which a share is read."""

    dtype: str
    share: float
    num_seqs: int = 16
    num_tokens: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    num_sets: int = 1
    shuffled: bool = False
    """Rows of a sequence lie anywhere in the arena instead of one behind the other."""

    @property
    def num_slots(self) -> int:
        """K: half recent, half older, and the token itself."""
        if self.share == 1.0:
            return self.num_tokens
        return 2 * round(self.num_tokens * self.share / 2) + 1


CASES = {
    "bf16-20": Case("bfloat16", 0.2),
    "int8-20": Case("int8", 0.2),
    "int4-20": Case("int4", 0.2),
    "f32-20": Case("float32", 0.2),
    "bf16-20-shuffled": Case("bfloat16", 0.2, shuffled=True),
    "bf16-dense": Case("bfloat16", 1.0),
    "f32-dense": Case("float32", 1.0),
    "bf16-20-gqa": Case("bfloat16", 0.2, num_kv_heads=8),
    "int8-20-gqa": Case("int8", 0.2, num_kv_heads=8),
    "bf16-20-per-head": Case("bfloat16", 0.2, num_kv_heads=8, num_sets=8),
    "bf16-20-b1-16k": Case("bfloat16", 0.2, num_seqs=1, num_tokens=16384),
    "bf16-dense-b1-16k": Case("bfloat16", 1.0, num_seqs=1, num_tokens=16384),
    "bf16-20-opt1.3b": Case("bfloat16", 0.2, num_tokens=640, head_dim=64),
    "f32-20-opt1.3b": Case("float32", 0.2, num_tokens=640, head_dim=64),
}


def make_slots(case: Case, generator: torch.Generator) -> Tensor:
    """The recent half is contiguous, the older half random; Int32[B, J, K]."""
    num_rows = case.num_seqs * case.num_tokens
    table = torch.randperm(num_rows, generator=generator) if case.shuffled else torch.arange(num_rows)
    table = table.view(case.num_seqs, case.num_tokens)
    num_older = 0 if case.share == 1.0 else case.num_slots // 2
    slots = torch.empty(case.num_seqs, case.num_sets, case.num_slots, dtype=torch.int32)
    for seq in range(case.num_seqs):
        for head in range(case.num_sets):
            first_recent = case.num_tokens - (case.num_slots - num_older)
            older = torch.randperm(first_recent, generator=generator)[:num_older].sort().values
            positions = torch.cat((older, torch.arange(first_recent, case.num_tokens)))
            slots[seq, head] = table[seq, positions].int()
    return slots


def contenders(case: Case, isa: str | None, only_kernel: bool) -> tuple[dict[str, Callable[[int], object]], int]:
    """Functions of the round number, and the bytes of rows that the kernel reads."""
    generator = torch.Generator().manual_seed(0)
    codec = make_codec(RowFormat(case.dtype, case.num_kv_heads, case.head_dim))
    value_dtype = TORCH_DTYPES.get(case.dtype, torch.bfloat16)
    num_rows = case.num_seqs * case.num_tokens
    kernels = CpuKernels(isa)
    arenas = [torch.empty(num_rows, codec.format.row_bytes, dtype=torch.uint8) for _ in range(NUM_ARENAS)]
    shape = (4096, case.num_kv_heads, case.head_dim)
    for arena in arenas:
        for first in range(0, num_rows, shape[0]):
            slots = torch.arange(first, min(first + shape[0], num_rows))
            k, v = (torch.randn(shape, generator=generator).to(value_dtype)[: len(slots)] for _ in range(2))
            kernels.append(arena, codec.format, slots, k, v)
    slots = [make_slots(case, generator) for _ in range(NUM_ARENAS)]
    counts = torch.full((case.num_seqs,), case.num_slots, dtype=torch.int32)
    q = torch.randn(case.num_seqs, case.num_heads, case.head_dim, generator=generator).to(value_dtype)
    grouped = case.num_kv_heads != case.num_heads
    found: dict[str, Callable[[int], object]] = {
        "kernel": lambda i: kernels(q, arenas[i % NUM_ARENAS], codec, slots[i % NUM_ARENAS], counts)
    }
    row_bytes = codec.format.row_bytes if case.num_sets == 1 else codec.format.row_bytes // case.num_kv_heads
    num_bytes = case.num_seqs * case.num_sets * case.num_slots * row_bytes
    if only_kernel:
        return found, num_bytes
    dense = [
        [torch.randn(case.num_seqs, case.num_kv_heads, case.num_tokens, case.head_dim).to(value_dtype) for _ in "kv"]
        for _ in range(NUM_ARENAS)
    ]
    found["dense SDPA"] = lambda i: sdpa(q.unsqueeze(2), *dense[i % NUM_ARENAS], enable_gqa=grouped)
    if case.num_sets == 1 and case.dtype in TORCH_DTYPES:

        def gather(i: int) -> Tensor:
            rows = arenas[i % NUM_ARENAS].index_select(0, slots[i % NUM_ARENAS].view(-1)).view(value_dtype)
            rows = rows.view(case.num_seqs, case.num_slots, 2, case.num_kv_heads, case.head_dim)
            k, v = (rows[:, :, half].transpose(1, 2) for half in range(2))
            return sdpa(q.unsqueeze(2), k, v, enable_gqa=grouped)

        found["gather + SDPA"] = gather
    if case.share < 1.0:
        found["torch twin"] = lambda i: decode_attention(
            q, arenas[i % NUM_ARENAS], codec, slots[i % NUM_ARENAS], counts
        )
    return found, num_bytes


def seconds(function: Callable[[int], object], round_number: int) -> float:
    """Wall time of one call."""
    start = perf_counter()
    function(round_number)
    return perf_counter() - start


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, object]:
    """Run one case, print its table, return its record."""
    functions, num_bytes = contenders(case, args.isa, args.only_kernel)
    buffer = torch.ones(1 << 25, dtype=torch.int64)  # 256 MiB
    functions["read"] = lambda _: buffer.sum()
    times: dict[str, list[float]] = {label: [] for label in functions}
    for round_number in range(args.runs + 2):
        for label, function in functions.items():
            elapsed = seconds(function, round_number)
            if round_number >= 2:
                times[label].append(elapsed)
    bandwidth = buffer.nbytes / median(times.pop("read"))
    print(f"\n{name}: {case}\n  rows read {num_bytes / 1e6:.1f} MB, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    record: dict[str, object] = {"case": name, "bytes": num_bytes, "read_bytes_per_s": bandwidth}
    kernel_s = median(times["kernel"])
    for label, runs in times.items():
        low, middle, high = quantiles(runs, n=4)
        spread = f"[{low * 1e3:.2f}, {high * 1e3:.2f}]"
        line = f"  {label:14} {middle * 1e3:8.2f} ms {spread:16} {middle / kernel_s:6.2f}x the kernel"
        if label == "kernel":
            line += f"  {num_bytes / middle / 1e9:.1f} GB/s, {num_bytes / middle / bandwidth:.0%} of the bandwidth"
        print(line)
        record[label] = {"median_s": middle, "low_s": low, "high_s": high}
    return record


def main() -> None:
    """Parse the command line and run the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--isa", choices=("avx512", "avx2", "portable"))
    parser.add_argument("--only-kernel", action="store_true", help="the kernel and the bandwidth, nothing else")
    args = parser.parse_args()
    records = [measure(name, CASES[name], args) for name in args.case]
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.processor()}
    print(
        json.dumps({"isa": CpuKernels(args.isa).isa, "environment": environment, "runs": args.runs, "cases": records})
    )


if __name__ == "__main__":
    main()
