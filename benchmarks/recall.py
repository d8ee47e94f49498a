"""Look-up accuracy of every selection policy on the model inside the package, decoded by the engine.

    python benchmarks/recall.py --data DIR

Sequences state facts, fill the space with held-out prose, and then ask for the facts (`training/recall.py`, tasks
`facts` and `quote`, seeds that training never used). Everything before the first question is prompt and read densely;
the questions are decoded under the policy, so that an answer must be found in the cache. DIR holds `heldout/*.txt`. The
last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tokenizers import Tokenizer

from alisa.config import PolicyName
from alisa.engine.kernels import choose_kernels
from alisa.engine.score import ScoredItem, teacher_forced
from alisa.kv.codec import make_codec
from alisa.llm import embedded_model
from alisa.model.decoder import Decoder
from alisa.model.loader import load_decoder
from alisa.policy.base import SelectionPolicy
from alisa.policy.table import make_policy
from alisa.types import RowFormat

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # the generator is a script of the training project
import recall  # pyrefly: ignore[missing-import]

TASKS = {"facts": recall.facts, "quote": recall.quote}


def samples(task: str, prose_text: str, length: int, count: int) -> list[recall.Sample]:
    """Sequences of a task around held-out prose."""
    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    vocabulary = recall.make_vocabulary(tokenizer)
    prose = recall.Prose(np.array(tokenizer.encode(prose_text, add_special_tokens=False).ids), vocabulary)
    rng = np.random.default_rng([20261121, list(TASKS).index(task)])
    return [TASKS[task](vocabulary, prose, rng, length) for _ in range(count)]


def accuracy(decoder: Decoder, policy: SelectionPolicy, items: list[recall.Sample]) -> tuple[float, int]:
    """Share of the targets that greedy decoding gets right, and their number."""
    targets = [np.flatnonzero(np.isin(item.kind, (recall.ANSWER, recall.COPY))) for item in items]
    # The prompt ends a little before the first target: its question is decoded, not read.
    starts = [max(2, int(found[0]) - 12) for found in targets]
    scored = [
        ScoredItem(item.ids[:start].tolist(), item.ids[start:].tolist())
        for item, start in zip(items, starts, strict=True)
    ]
    codec = make_codec(RowFormat("float32", decoder.spec.num_kv_heads, decoder.spec.head_dim))
    right = 0
    for step in teacher_forced(decoder, policy, codec, choose_kernels(decoder.device), scored, prefill_chunk=1024):
        chosen = step.logits.argmax(dim=-1).tolist()
        for index, token_id in zip(step.items, chosen, strict=True):
            place = starts[index] + step.step
            right += int(place in targets[index] and token_id == items[index].ids[place])
    total = sum(len(found) for found in targets)
    return right / total, total


def main() -> None:
    """Print one line per policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--policies", nargs="+", default=[name for name in get_args(PolicyName) if name != "dense"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    args = parser.parse_args()
    decoder = load_decoder(embedded_model(), torch.float32, torch.device("cpu"))
    books = [path.read_text(encoding="utf-8") for path in sorted((args.data / "heldout").glob("*.txt"))]
    cells = []
    for task in TASKS:
        items = samples(task, "\n".join(book[:300_000] for book in books), args.length, args.sequences)
        for name in ["dense", *args.policies]:
            share, total = accuracy(decoder, make_policy(name, args.sparsity), items)
            cells.append({"task": task, "policy": name, "accuracy": round(share, 4), "targets": total})
            print(f"{task:8}{name:12}{share:8.1%}  of {total}", flush=True)
    print(json.dumps({"benchmark": "recall", "sparsity": args.sparsity, "length": args.length, "cells": cells}))


if __name__ == "__main__":
    main()
