"""How long a reader waits between two tokens while somebody else's long prompt is read, and what the reading costs.

    make models
    python benchmarks/pace.py --record benchmarks/results/pace.jsonl

One request is being answered; then a long prompt comes. Without `max_step_tokens` (prompts are read first) and with
several values, in turns, each once in every round. The last line for each value is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from real_models import REAL_MODELS
from recording import tell

from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp

WORKER = """
import json, sys
from time import perf_counter
from alisa import SamplingParams
from alisa.config import EngineConfig
from alisa.engine.builder import build_engine
from alisa.engine.loaded import load_model

job = json.load(sys.stdin)
length = job["prompt_len"] + 64
config = EngineConfig(
    model=job["model"], max_num_seqs=2, max_model_len=length, weight_dtype="float",
    max_step_tokens=job["max_step_tokens"],
)
engine, _ = build_engine(load_model(config), config)
def tokens(count, seed):
    return [10 + (7919 * number + seed) % 40000 for number in range(count)]
reader = engine.add_request(tokens(16, 1), SamplingParams(max_tokens=job["prompt_len"], ignore_eos=True))
for _ in range(20):
    engine.step()
asked = last = perf_counter()
long = engine.add_request(tokens(job["prompt_len"], 2), SamplingParams(max_tokens=1, ignore_eos=True))
gaps = []
answered = None
while answered is None:
    output = engine.step()
    now = perf_counter()
    if any(delta.request_id == reader for delta in output.deltas):
        gaps.append(now - last)
        last = now
    if any(request.request_id == long for request in output.finished):
        answered = now - asked
gaps.append(perf_counter() - last)
engine.close()
print(json.dumps({"longest_gap_s": max(gaps), "first_token_s": answered}))
"""


def main() -> None:
    """Every value, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REAL_MODELS[0].path), help="a model of at least so many positions")
    parser.add_argument("--prompt-len", type=int, default=8000)
    parser.add_argument("--max-step-tokens", type=int, nargs="+", default=[0, 1024, 256], help="0: prompts first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {value: [] for value in args.max_step_tokens}
    meter = OthersMeter()
    for number in range(args.rounds):
        for value in args.max_step_tokens if number % 2 == 0 else reversed(args.max_step_tokens):
            job = {"model": args.model, "prompt_len": args.prompt_len, "max_step_tokens": value or None}
            run = subprocess.run(
                [sys.executable, "-c", WORKER], input=json.dumps(job), capture_output=True, text=True, check=True
            )
            found[value].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"  round {number + 1}, {value}: {found[value][-1]}")
    others_share = round(meter.share(), 4)
    for value, runs in found.items():
        record = {
            "benchmark": "pace",
            "model": Path(args.model).name,
            "prompt_len": args.prompt_len,
            "max_step_tokens": value or None,
            "longest_gap_s": median(run["longest_gap_s"] for run in runs),
            "first_token_s": median(run["first_token_s"] for run in runs),
            "rounds": runs,
            "others_share": others_share,
            "stamp": asdict(current_stamp()),
        }
        tell(record, args.record)


if __name__ == "__main__":
    main()
