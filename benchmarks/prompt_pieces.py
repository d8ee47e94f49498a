"""A later piece of a prompt: 1024 tokens that attend to each other and to 1024 before them, against plain torch.

python benchmarks/prompt_pieces.py --record benchmarks/results/prompt_pieces.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from alisa.attention.prefill import KeyBlock, attend_after, attend_after_plain
from alisa.bench.stamp import Stamp

SHAPES = ((32, 32, 64), (32, 4, 64))
"""(query heads, KV heads, values of a head)."""
TOKENS = 1024
ROUNDS = 7


def main() -> None:
    """Both ways in turns, for each shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    results = []
    for num_heads, num_kv_heads, head_dim in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(TOKENS, num_heads, head_dim).to(dtype)
            k, v = torch.randn(2, 2 * TOKENS, num_kv_heads, head_dim).to(dtype)
            past, own = KeyBlock(0, k[:TOKENS], v[:TOKENS]), KeyBlock(TOKENS, k[TOKENS:], v[TOKENS:])
            taken: dict[str, list[float]] = {"flash": [], "plain": []}
            for _ in range(ROUNDS + 1):
                for name, attend in (("flash", attend_after), ("plain", attend_after_plain)):
                    started = perf_counter()
                    attend(q, own, (past,))
                    taken[name].append(perf_counter() - started)
            times = {name: sorted(values[1:]) for name, values in taken.items()}
            result = {"heads": num_heads, "kv_heads": num_kv_heads, "dtype": str(dtype).removeprefix("torch.")} | {
                f"{name}_ms": [round(value * 1e3, 1) for value in (values[0], median(values), values[-1])]
                for name, values in times.items()
            }
            results.append(result)
            print(result)
    if args.record:
        with args.record.open("a") as file:
            record = {"benchmark": "prompt_pieces", "tokens": TOKENS, "results": results, "stamp": asdict(Stamp.now())}
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
