"""Less memory than the cache needs: tokens per second and the time split under device caps, random weights.

Each run decodes one batch with room on the device for a share of what the whole KV cache takes, staging included; the
rest goes to disk. What is printed for each: speed, the parts of a decode step, rows fetched and stored, the hit rate
of the hot cache, the share of the transfers that was hidden, and the bytes moved for each token.

    python benchmarks/tiers.py --policy swa dense --cap 1 0.5 0.25 --static 0.25
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from recording import tell

from alisa.config import EngineConfig
from alisa.engine.builder import CacheOptions
from alisa.lab.bench.floor import read_bandwidth
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_within, kv_dtype_of, run_batch
from alisa.lab.bench.stamp import current_stamp
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.outputs import StepRecord
from alisa.planner.footprint import kv_token_bytes
from alisa.planner.shapes import SHAPES
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase


def run(
    decoder: Decoder, policy: str, cap: float, scheduler: PlacementPolicy | None, args: argparse.Namespace
) -> tuple[tuple[StepRecord, ...], dict[str, object]]:
    """Steps of one batch whose K and V take `cap` times what all rows take."""
    rows = args.batch * (args.prompt_len + args.output_len - 1)
    config = EngineConfig(
        policy=policy,
        sparsity=args.sparsity,
        kv_dtype=args.kv_dtype or "auto",
        kv_disk_path=args.disk_path,
        max_num_seqs=args.batch,
    )
    total = rows * kv_token_bytes(decoder.spec, kv_dtype_of(decoder, config))
    config = replace(config, kv_disk_memory=2 * total if cap < 1 or scheduler else 0)
    config = batch_config(config, [args.prompt_len] * args.batch, args.output_len)
    options = CacheOptions(placement=scheduler)
    cap_bytes = device_cap_within(decoder, RunSpec(config, options), int(cap * total))
    run_spec = RunSpec(replace(config, kv_device_memory=cap_bytes), options)
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(10, decoder.spec.vocab_size) for _ in range(args.prompt_len)] for _ in range(args.batch)]
    started = perf_counter()
    ran = run_batch(decoder, run_spec, prompts, args.output_len)
    wall_s = perf_counter() - started
    tokens = args.batch * args.output_len
    decode_s = sum(record.wall_s for record in ran.decode)
    details = ran.details()
    return ran.records, {
        "policy": policy,
        "cap": cap,
        "output_len": args.output_len,
        "cap_bytes": cap_bytes,
        "tokens_per_s": round(tokens / wall_s, 2),
        "decode_tokens_per_s": round(sum(record.num_tokens for record in ran.decode) / decode_s, 2),
        "prefill_s": round(sum(record.wall_s for record in ran.records if record.prefill), 2),
        "decode_ms": round(decode_s / len(ran.decode) * 1e3, 2),
        "moved_kb_per_token": round(details["moved_bytes"] / tokens / 1e3, 1),
        **details,
    }


def main() -> None:
    """Every policy under every cap, then the static split and the planned phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kv-dtype", choices=("float32", "bfloat16", "int8", "int4"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--policy", nargs="*", default=["swa"])
    parser.add_argument("--cap", nargs="*", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument("--static", nargs="*", type=float, default=[], help="caps for dense with a fixed split")
    parser.add_argument("--phases", nargs=4, type=float, metavar=("P1", "P2", "ALPHA", "BETA"))
    parser.add_argument("--disk-path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=Path, help="write the records of every step of the last run here")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    decoder = random_decoder(SHAPES[args.shape], getattr(torch, args.dtype), torch.device("cpu"), args.seed)
    jobs: list[tuple[str, float, PlacementPolicy | None]] = [
        (name, cap, None) for name in args.policy for cap in args.cap
    ]
    # As FlexGen would be set: as much on the device as fits, the rest below.
    jobs += [("dense", cap, StaticSplit(1 - 0.9 * cap)) for cap in args.static]
    if args.phases:
        p1, p2, alpha, beta = args.phases
        schedule = Schedule(offload_from=int(p1), recompute_from=int(p2), offload_ratio=alpha, recompute_ratio=beta)
        jobs += [(name, cap, ThreePhase(schedule)) for name in args.policy for cap in args.cap if cap < 1]
    results, records = [], []
    for name, cap, scheduler in jobs:
        gc.collect()
        records, result = run(decoder, name, cap, scheduler, args)
        results.append(result)
        print(
            f"{name:8} cap {cap:4.0%} {result['scheduler']:12} {result['tokens_per_s']:7.1f} tok/s  "
            f"step {result['decode_ms']:7.1f} ms {result['parts_ms']}  hits {result['hit_rate']:.1%}  "
            f"hidden {result['hidden_share']:.0%}  {result['moved_kb_per_token']} kB/token  {result['phases']}",
            flush=True,
        )
    if args.steps:
        lines = [json.dumps({"kind": "step", **asdict(record)}, default=str) for record in records]
        args.steps.write_text("\n".join(lines) + "\n")
    settings = {key: value for key, value in vars(args).items() if key not in ("steps", "record", "disk_path")}
    record = {
        "benchmark": "tiers",
        **settings,
        "stamp": asdict(current_stamp()),
        "others_share": round(meter.share(), 4),
        "read_gb_per_s": round(read_bandwidth() / 1e9, 1),
        "results": results,
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
