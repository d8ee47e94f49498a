"""What the planner's search chooses, run for real against eight schedules made by hand, on a model of random weights.

Every schedule runs once in each round, and the median over the rounds counts. Run `alisa profile` first, on an idle
machine, and then, still idle:

    python benchmarks/schedules.py --record benchmarks/results/schedules.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from recording import tell

from alisa.lab.bench.stamp import current_stamp
from alisa.lab.bench.uniform_batch import (
    UniformBatch,
    run_uniform_batch,
)
from alisa.model.loader import random_decoder
from alisa.planner.footprint import kv_token_bytes
from alisa.planner.load import RunConfig
from alisa.planner.saved import load_profile
from alisa.planner.search import search
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import (
    MemoryBudget,
    UniformWorkload,
)
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.three_phase import (
    Schedule,
    ThreePhase,
)


def by_hand(last: int) -> dict[str, ThreePhase]:
    """Eight schedules for `last` generated tokens: by pressure, early and late, little and much, with deletion."""

    def made(start: int, later: int, ratio: float, deleted: float) -> ThreePhase:
        return ThreePhase(
            Schedule(offload_from=start, recompute_from=later, offload_ratio=ratio, recompute_ratio=deleted)
        )

    return {
        "by pressure": ThreePhase(),
        "half from the start": made(0, 0, 0.5, 0.0),
        "nearly all from the start": made(0, 0, 0.9, 0.0),
        "most, late": made(last // 4, last // 4, 0.8, 0.0),
        "little, late": made(last // 2, last // 2, 0.3, 0.0),
        "most, half of it deleted late": made(0, last // 2, 0.7, 0.5),
        "most, half of it deleted early": made(0, last // 8, 0.8, 0.5),
        "late, all of it deleted later": made(last // 4, 3 * last // 4, 0.8, 1.0),
    }


def describe(scheduler: PlacementPolicy) -> dict[str, float] | str:
    """Its four numbers; its name when there are none."""
    planned = isinstance(scheduler, ThreePhase) and scheduler.schedule is not None
    return asdict(scheduler.schedule) if planned else scheduler.name


def main() -> None:
    """Search, then run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--policy", choices=("dense", "swa", "sketch"), default="swa")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--cap", type=float, default=0.4, help="share of the KV cache that the device holds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    hardware = load_profile()
    if hardware is None:
        raise SystemExit("There is no profile of this machine; run alisa profile first.")
    spec, workload = SHAPES[args.shape], UniformWorkload(args.batch, args.prompt_len, args.output_len)
    method = RunConfig(args.policy, 0.8, "bfloat16", "bfloat16")
    total = args.batch * workload.num_rows * kv_token_bytes(spec, "bfloat16")
    found = search(spec, workload, hardware, [method], room=MemoryBudget(int(args.cap * total), 2 * total))
    assert found is not None, "disk takes everything"
    schedulers: dict[str, PlacementPolicy] = {"the search's choice": found.best.scheduler, **by_hand(args.output_len)}
    decoder = random_decoder(spec, torch.bfloat16, torch.device("cpu"), 0)
    directory = Path(tempfile.gettempdir())
    run_uniform_batch(UniformBatch("dense", 2, 64, 8), decoder, directory)
    times: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(args.rounds):
        for name, scheduler in schedulers.items():
            uniform = UniformBatch(
                args.policy,
                found.best.workload.batch,
                args.prompt_len,
                args.output_len,
                cap=args.cap * workload.batch / found.best.workload.batch,
                scheduler=scheduler,
            )
            run = run_uniform_batch(uniform, decoder, directory)
            times[name].append(found.best.waves * sum(record.wall_s for record in run.records))
    for name, taken in sorted(times.items(), key=lambda item: median(item[1])):
        print(f"{median(taken):7.2f} s  ({min(taken):.2f} to {max(taken):.2f})  {name}")
    best = min(median(taken) for name, taken in times.items() if name != "the search's choice")
    chosen = median(times["the search's choice"])
    said = found.best.seconds(overlap=True)
    print(
        f"the search's choice takes {chosen / best - 1:+.1%} of the best by hand; it was predicted to take {said:.2f} s"
    )
    record = {
        "benchmark": "schedules",
        **{key: value for key, value in vars(args).items() if key != "record"},
        "choice": describe(found.best.scheduler),
        "predicted_s": round(said, 3),
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in times.items()},
        "over_best": round(chosen / best - 1, 4),
        "stamp": asdict(current_stamp()),
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
