"""Less memory than the cache needs: tokens per second and the time split under device caps, random weights.

Each run decodes one batch under a cap that is a share of what the whole KV cache takes; the rest goes to disk. What is
printed for each: speed, the parts of a decode step, rows fetched and stored, the hit rate of the hot cache, the share
of the transfers that was hidden, and the bytes moved for each token.

    python benchmarks/tiers.py --policy swa dense --cap 1 0.5 0.25 --static 0.25
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from decode_step import SHAPES, read_bandwidth

from alisa.config import SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.kv.codec import make_codec
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.policy.table import make_policy
from alisa.schedule.base import Scheduler
from alisa.schedule.static import StaticSplit
from alisa.schedule.three_phase import Schedule, ThreePhase
from alisa.types import RowFormat, StepRecord, Traffic


def run(
    decoder: Decoder, policy_name: str, cap: float, scheduler: Scheduler | None, args: argparse.Namespace
) -> tuple[list[StepRecord], dict[str, object]]:
    """Steps of one batch under a cap of `cap` times the KV cache."""
    spec = decoder.spec
    length = args.prompt_len + args.output_len - 1
    policy = make_policy(policy_name, args.sparsity)
    codec = make_codec(RowFormat(args.kv_dtype or args.dtype, spec.num_kv_heads, spec.head_dim))
    kernels = choose_kernels(decoder.device)
    total = args.batch * length * spec.num_layers * codec.format.row_bytes
    caps = Caps(int(cap * total), 0, 2 * total if cap < 1 or scheduler else 0, args.disk_path)
    memory = make_memory(decoder, policy, codec, kernels, [length] * args.batch, caps, scheduler, args.batch)
    state = policy.start(spec, args.batch, length, decoder.device, kernels.selection)
    runner = Runner(
        decoder, policy, memory.store, state, kernels.attend, Stopwatch(), looks_ahead=memory.scheduler.uses_tiers
    )
    placement = Placement(memory.scheduler, memory.limits, memory.store, policy)
    engine = Engine(runner, placement, eos_ids=frozenset(), prefill_chunk=1024)
    generator = torch.Generator().manual_seed(args.seed)
    for index in range(args.batch):
        ids = torch.randint(10, spec.vocab_size, (args.prompt_len,), generator=generator).tolist()
        params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
        engine.submit(Request(index, tuple(ids), params, args.output_len))
    records = []
    started = perf_counter()
    while (result := engine.step()) is not None:
        records.append(result.record)
    wall_s = perf_counter() - started
    memory.store.close()
    decode = [record for record in records if not record.prefill]
    traffic = sum((record.traffic for record in records), Traffic())
    tokens = args.batch * args.output_len
    parts = ("linear", "attention", "selection", "transfer", "sampling", "other")
    decode_s = sum(record.wall_s for record in decode)
    return records, {
        "policy": policy_name,
        "cap": cap,
        "scheduler": memory.scheduler.name,
        "output_len": args.output_len,
        "cap_bytes": int(cap * total),
        "peak_bytes": max(record.kv_bytes for record in records),
        "disk_peak_bytes": max(record.disk_bytes for record in records),
        "tokens_per_s": round(tokens / wall_s, 2),
        "decode_tokens_per_s": round(sum(record.num_tokens for record in decode) / decode_s, 2),
        "prefill_s": round(sum(record.wall_s for record in records if record.prefill), 2),
        "decode_ms": round(decode_s / len(decode) * 1e3, 2),
        "parts_ms": {p: round(sum(getattr(r, f"{p}_s") for r in decode) / len(decode) * 1e3, 2) for p in parts},
        "phases": {phase: sum(r.phase == phase for r in decode) for phase in {r.phase for r in decode}},
        "preempted": sum(record.num_preempted for record in records),
        "hit_rate": round(traffic.hit_rate, 4),
        "hidden_share": round(traffic.hidden_share, 3),
        "moved_kb_per_token": round(traffic.moved_bytes / tokens / 1e3, 1),
        "traffic": asdict(traffic),
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
    decoder = random_decoder(SHAPES[args.shape], getattr(torch, args.dtype), torch.device("cpu"), args.seed)
    jobs: list[tuple[str, float, Scheduler | None]] = [(name, cap, None) for name in args.policy for cap in args.cap]
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
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "read_gb_per_s": round(read_bandwidth() / 1e9, 1),
        "results": results,
    }
    print(json.dumps(record, default=str))
    if args.record:
        with args.record.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")


if __name__ == "__main__":
    main()
