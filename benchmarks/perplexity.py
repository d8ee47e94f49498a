"""Perplexity of every selection policy on one text, through the engine's own prefill and decode path.

    python benchmarks/perplexity.py --model DIR --text FILE --prompt-len 128 --length 512

The text is cut into windows of `--length` tokens; the first `--prompt-len` of each are read densely, the rest is
decoded under the policy, and the perplexity of the rest is compared with that of dense attention on the same windows.
The last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import json
from math import exp
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch

from alisa.config import PolicyName
from alisa.engine.kernels import choose_kernels
from alisa.engine.score import ScoredItem, teacher_forced
from alisa.kv.codec import FloatCodec
from alisa.llm import embedded_model
from alisa.model.decoder import Decoder
from alisa.model.loader import load_decoder
from alisa.model.tokenizer import Tokenizer
from alisa.policy.base import SelectionPolicy
from alisa.policy.table import make_policy
from alisa.types import RowFormat


def windows(ids: list[int], length: int, prompt_len: int, count: int) -> list[ScoredItem]:
    """The first `count` windows of `length` tokens, each beginning with the text's first token."""
    first, rest = ids[:1], ids[1:]
    chunks = [rest[i : i + length - 1] for i in range(0, len(rest) - length + 2, length - 1)][:count]
    return [ScoredItem(first + chunk[: prompt_len - 1], chunk[prompt_len - 1 :]) for chunk in chunks]


def negative_log_likelihood(decoder: Decoder, policy: SelectionPolicy, items: list[ScoredItem]) -> tuple[float, int]:
    """Sum over all output tokens, in nats, and their number."""
    codec = FloatCodec(RowFormat("float32", decoder.spec.num_kv_heads, decoder.spec.head_dim))
    total, num_tokens = 0.0, 0
    for step in teacher_forced(decoder, policy, codec, choose_kernels(decoder.device), items, prefill_chunk=1024):
        targets = torch.tensor([items[index].output_ids[step.step] for index in step.items])
        total -= float(step.logits.log_softmax(dim=-1).gather(1, targets[:, None]).sum())
        num_tokens += len(step.items)
    return total, num_tokens


def main() -> None:
    """Print one line per policy and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--policies", nargs="+", default=[name for name in get_args(PolicyName) if name != "dense"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    decoder = load_decoder(args.model, torch.float32, torch.device("cpu"))
    text = args.text.read_text(encoding="utf-8").replace("\n\n", "\n")
    items = windows(Tokenizer.load(args.model).encode(text), args.length, args.prompt_len, args.windows)
    total, num_tokens = negative_log_likelihood(decoder, make_policy("dense", 0.0), items)
    dense = exp(total / num_tokens)
    print(f"{len(items)} windows, {num_tokens} tokens scored; dense perplexity {dense:.3f}")
    print(f"{'ratio to dense':14}" + "".join(f"{sparsity:>9}" for sparsity in args.sparsities))
    cells = []
    for name in args.policies:
        row = []
        for sparsity in args.sparsities:
            start = perf_counter()
            total, _ = negative_log_likelihood(decoder, make_policy(name, sparsity), items)
            row.append(exp(total / num_tokens) / dense)
            cells.append(
                {
                    "policy": name,
                    "sparsity": sparsity,
                    "ratio": round(row[-1], 4),
                    "s": round(perf_counter() - start, 1),
                }
            )
        print(f"{name:14}" + "".join(f"{ratio:9.4f}" for ratio in row))
    record = {
        "benchmark": "perplexity",
        "text": args.text.name,
        "model": args.model.name,
        "prompt_len": args.prompt_len,
        "length": args.length,
        "windows": len(items),
        "tokens": num_tokens,
        "dense": round(dense, 4),
        "cells": cells,
        "torch": torch.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
