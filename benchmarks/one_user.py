"""One user with a small real model: a decode step after a short and after a long prompt, and reading the prompt.

    make models
    python benchmarks/one_user.py --record benchmarks/results/one_user.jsonl

Every kind of weights and rows in a process of its own, in turns, several rounds; a step is the median of a text's. The
floor is the time that reading the weights of a step and the rows that dense attention reads would take at the memory's
bandwidth, measured in the same process. Each case ends with one JSON record.
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

CASES = (
    ("dense", "float", "auto"),
    ("sketch", "float", "auto"),
    ("dense", "int8", "int8"),
    ("sketch", "int8", "int8"),
    ("dense", "int4", "int8"),
    ("sketch", "int4", "int8"),
)
"""Policy, weights, rows."""

WORKER = """
import json, sys
from statistics import median
from time import perf_counter
from alisa import LLM, SamplingParams
from alisa.lab.bench.floor import read_bandwidth

job = json.load(sys.stdin)
bandwidth = read_bandwidth()
config = {name: job[name] for name in ("policy", "weight_dtype", "kv_dtype")}
with LLM(job["model"], max_model_len=8192, max_num_seqs=1, **config) as llm:
    params = SamplingParams(max_tokens=job["output_len"], ignore_eos=True)
    for warm in (True, False):
        prompt = [10 + (7919 * number + warm) % 40000 for number in range(job["prompt_len"])]
        begun, times = perf_counter(), []
        for _ in llm.stream([prompt], params):
            times.append(perf_counter())
    steps = [after - before for before, after in zip(times[1:], times[2:])]
    spec, decoder = llm.spec, llm.model.decoder
    table_bytes = spec.vocab_size * spec.token_embed_dim * decoder.dtype.itemsize  # looked up in, not read
    read_bytes = decoder.weight_bytes - table_bytes + job["prompt_len"] * llm.describe()["kv_token_bytes"]
    floor_s = read_bytes / bandwidth
    print(json.dumps({"step_s": median(steps), "prefill_s": times[0] - begun, "floor_s": floor_s}))
"""


def run(job: dict[str, object]) -> dict[str, float]:
    """One text in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure all cases in turns, print a line for each, and append the records to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REAL_MODELS[0].path)
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[16, 4000])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    if not args.model.exists():
        sys.exit(f"{args.model} is not there; `make models` fetches it.")
    meter = OthersMeter()
    found: dict[tuple[int, tuple[str, str, str]], list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for prompt_len in args.prompt_len:
            for case in CASES if number % 2 == 0 else CASES[::-1]:
                policy, weights, rows = case
                job = {"model": str(args.model), "policy": policy, "weight_dtype": weights, "kv_dtype": rows}
                job |= {"prompt_len": prompt_len, "output_len": args.output_len}
                found.setdefault((prompt_len, case), []).append(run(job))
    others = meter.share()
    for (prompt_len, (policy, weights, rows)), runs in found.items():
        steps = [one["step_s"] for one in runs]
        record = {
            "benchmark": "one_user",
            "model": args.model.name,
            "policy": policy,
            "weight_dtype": weights,
            "kv_dtype": rows,
            "prompt_len": prompt_len,
            "output_len": args.output_len,
            "step_s": {"median": median(steps), "all": steps},
            "prefill_s": median(one["prefill_s"] for one in runs),
            "floor_s": median(one["floor_s"] for one in runs),
            "others_share": others,
            "stamp": asdict(current_stamp()),
        }
        spread = f"{1 / max(steps):.0f} to {1 / min(steps):.0f}"
        print(
            f"{policy:7} weights {weights:5} rows {rows:5} after {prompt_len:5}: {1e3 * median(steps):6.2f} ms a step, "
            f"floor {1e3 * record['floor_s']:.2f} ms, {1 / median(steps):5.0f} tokens/s ({spread}); prompt "
            f"{prompt_len / record['prefill_s']:.0f} tokens/s"
        )
        tell(record, args.record)


if __name__ == "__main__":
    main()
