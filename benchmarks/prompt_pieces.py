"""Attention while a prompt is read: the native kernel, torch's flash attention, plain torch, and the products alone.

    python benchmarks/prompt_pieces.py --record benchmarks/results/prompt_pieces.jsonl

The floor is the causal products (no exponentials, nothing above the diagonal) at the rate at which a large matrix
product of the same dtype runs in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from recording import tell

from alisa.errors import InputError
from alisa.kernels.base import KeyBlock
from alisa.kernels.native import prefill as cpu_prefill
from alisa.kernels.reference.prefill import (
    attend_after,
    attend_after_plain,
)
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.model.choose_linear import choose_linear

ROUNDS = 15
PRODUCT = (1024, 4096, 4096)
"""Rows, inputs and outputs of the large product."""


@dataclass(frozen=True)
class Case:
    """T tokens that attend to each other and to as many as `past` before them."""

    name: str
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    past: int = 0
    with_plain: bool = True
    """Plain torch makes all scores of a head explicit: not for 4096 tokens."""

    @property
    def flops(self) -> float:
        """Of the products with the keys that are seen and with their values."""
        pairs = self.tokens * (self.tokens + 1) / 2 + self.tokens * self.past
        return 4 * pairs * self.num_heads * self.head_dim


CASES = (
    Case("prefill-llama-1.1b", 1024, 32, 4, 64),
    Case("prefill-opt-1.3b", 1024, 32, 32, 64),
    Case("prefill-8-of-32-128", 1024, 32, 8, 128),
    Case("prefill-after-1024", 1024, 32, 4, 64, past=1024),
    Case("prefill-4096", 4096, 32, 4, 64, with_plain=False),
)


def candidates(case: Case) -> dict[str, Callable[[], object]]:
    """Everything that runs in a round."""
    q = torch.randn(case.tokens, case.num_heads, case.head_dim).bfloat16()
    k, v = torch.randn(case.past + case.tokens, 2, case.num_kv_heads, case.head_dim).bfloat16().unbind(1)
    own = KeyBlock(case.past, k[case.past :], v[case.past :])
    past = [KeyBlock(0, k[: case.past], v[: case.past])] if case.past else []
    rows, num_in, num_out = PRODUCT
    x = torch.randn(rows, num_in).bfloat16()
    linear = choose_linear("float", torch.bfloat16, torch.device("cpu")).layer(
        torch.randn(num_out, num_in).bfloat16(), None
    )
    kernel = cpu_prefill.CpuPrefill()
    found: dict[str, Callable[[], object]] = {
        "native": lambda: kernel.attend(q, own, past),
        "flash": lambda: attend_after(q, own, past),
        "product": lambda: linear(x),
    }
    return found | ({"plain": lambda: attend_after_plain(q, own, past)} if case.with_plain else {})


def measure(case: Case) -> dict[str, Any]:
    """Medians and quartiles of all candidates, in turns."""
    work = candidates(case)
    taken: dict[str, list[float]] = {name: [] for name in work}
    meter = OthersMeter()
    for _ in range(ROUNDS + 1):
        for name, run in work.items():
            started = perf_counter()
            run()
            taken[name].append(perf_counter() - started)
    times = {f"{name}_s": quantiles(values[1:], n=4) for name, values in taken.items()}
    rows, num_in, num_out = PRODUCT
    rate = 2 * rows * num_in * num_out / times["product_s"][1]
    return {
        **asdict(case),
        **times,
        "product_flops_per_s": rate,
        "floor_s": case.flops / rate,
        "others_share": round(meter.share(), 4),
    }


def main() -> None:
    """Every case, one line each and one record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    if not cpu_prefill.available():
        raise InputError("There is no native prefill kernel to measure here: it needs AVX512-BF16 and a compiler.")
    results = []
    for case in CASES:
        result = measure(case)
        results.append(result)
        native, flash = result["native_s"], result["flash_s"]
        print(
            f"{case.name:22} native {native[1] * 1e3:6.1f} ms ({native[0] * 1e3:.1f} to {native[2] * 1e3:.1f}), "
            f"flash {flash[1] * 1e3:6.1f}, {flash[1] / native[1]:.1f}x; floor {result['floor_s'] * 1e3:.1f} ms"
        )
    record = {
        "benchmark": "prompt_pieces",
        "rounds": ROUNDS,
        "results": results,
        "stamp": asdict(current_stamp()),
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
