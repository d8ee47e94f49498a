"""Time of one decode step against its floor, split into its parts, on random weights.

    python benchmarks/decode_step.py --shape opt-1.3b --dtype float32 --batch 16 --prompt-len 128 --output-len 64

The floor is what the matrix library itself needs: the same packed linear layers, run one after the other with nothing
in between. Beside it stands the time that reading the weights once would take at the measured memory bandwidth. Both
are measured in the same process, before the run. The last line of the output is one JSON record.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import get_args

import torch
from recording import tell

from alisa.config import EngineConfig, KvDtypeName, PolicyName, WeightFormat
from alisa.lab.bench.floor import measure_speeds
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.session import RunSpec, run_batch
from alisa.lab.bench.stamp import current_stamp
from alisa.model.choose_linear import choose_linear
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.outputs import StepRecord
from alisa.planner.shapes import SHAPES


def run(decoder: Decoder, policy: PolicyName, args: argparse.Namespace) -> tuple[StepRecord, ...]:
    """All steps of one batch."""
    config = EngineConfig(
        policy=policy, sparsity=args.sparsity, kv_dtype=args.kv_dtype, kv_disk_memory=0, max_num_seqs=args.batch
    )
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(10, decoder.spec.vocab_size) for _ in range(args.prompt_len)] for _ in range(args.batch)]
    return run_batch(decoder, RunSpec(config), prompts, args.output_len).records


def main() -> None:
    """Measure the floor, then every policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--weight-dtype", choices=get_args(WeightFormat), default="float")
    parser.add_argument("--kv-dtype", choices=get_args(KvDtypeName), default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--policy", nargs="+", choices=get_args(PolicyName), default=["dense", "swa"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    spec, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    speeds = measure_speeds(spec, dtype, batch=args.batch, rows=args.batch, weight_dtype=args.weight_dtype)
    bandwidth, floor_s = speeds.read_bytes_per_s, speeds.decode_gemm_s
    weight_bytes = spec.step_weights if args.weight_dtype == "int8" else spec.step_weight_bytes(args.dtype)
    read_s = weight_bytes / bandwidth
    device = torch.device("cpu")
    decoder = random_decoder(spec, dtype, device, args.seed, choose_linear(args.weight_dtype, dtype, device))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; weights {weight_bytes / 1e9:.2f} GB")
    print(f"floor of one step: GEMMs alone {floor_s * 1e3:.0f} ms, reading the weights {read_s * 1e3:.0f} ms")
    columns = ("step", "linear", "/floor", "attend", "select", "sample", "other")
    print(f"{'medians, ms':14}" + "".join(f"{column:>8}" for column in columns))
    results = {}
    for policy in args.policy:
        records = run(decoder, policy, args)
        steps = [record for record in records if not record.prefill][2:]
        parts = {
            part: median(getattr(record, part) for record in steps) * 1e3
            for part in ("wall_s", "linear_s", "attention_s", "selection_s", "sampling_s", "other_s")
        }
        results[policy] = {
            "step_ms": {name.removesuffix("_s"): round(value, 2) for name, value in parts.items()},
            "wall_ms_min_max": [round(f(record.wall_s for record in steps) * 1e3, 1) for f in (min, max)],
            "linear_over_floor": round(parts["linear_s"] / floor_s / 1e3, 3),
            "prefill_s": round(sum(record.wall_s for record in records if record.prefill), 2),
            "tokens_per_s": round(args.batch / median(record.wall_s for record in steps), 1),
        }
        print(
            f"{policy:14}{parts['wall_s']:8.0f}{parts['linear_s']:8.0f}{parts['linear_s'] / floor_s / 1e3:8.2f}"
            f"{parts['attention_s']:8.0f}{parts['selection_s']:8.1f}{parts['sampling_s']:8.1f}{parts['other_s']:8.2f}"
        )
    record = {
        "benchmark": "decode_step",
        **{key: value for key, value in vars(args).items() if key != "record"},
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_gemm_ms": round(floor_s * 1e3, 1),
        "floor_read_ms": round(read_s * 1e3, 1),
        "results": results,
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
