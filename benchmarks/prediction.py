"""What `alisa plan` would have said against what happened: decode steps of random models, predicted from the profile.

None of these models was used to fit the profile. Every configuration runs several times, in rounds, because a machine
is not equally fast all the time; the error is that of the median decode step. Run `alisa profile` first, on an idle
machine, and then, still idle:

    python benchmarks/prediction.py --output benchmarks/results/prediction.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from alisa.config import (
    KvDtypeName,
    PolicyName,
)
from alisa.lab.bench.session import RunResult
from alisa.lab.bench.uniform_batch import UniformBatch, run_uniform_batch
from alisa.model.loader import random_decoder
from alisa.outputs import Traffic
from alisa.planner.cost import (
    CostModel,
    StepCost,
)
from alisa.planner.hardware import Hardware
from alisa.planner.load import (
    RunConfig,
    StepWork,
)
from alisa.planner.saved import load_profile
from alisa.planner.shapes import (
    SHAPES,
    llama_shape,
)
from alisa.planner.simulate import simulate
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import (
    Schedule,
    ThreePhase,
)

MODELS = {"opt-125m": SHAPES["opt-125m"], "llama-gqa": llama_shape(10, 1024, 16, num_kv_heads=4, ffn_size=2816)}
SKIPPED = 3
"""First decode steps, which allocate what later ones use again."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: str
    policy: PolicyName
    batch: int
    cap: float = 1.0
    """Of what all rows take."""
    kv_dtype: KvDtypeName = "bfloat16"
    scheduler: PlacementPolicy | None = None
    placement: str = "device"
    prompt_len: int = 192
    output_len: int = 64

    @property
    def uniform(self) -> UniformBatch:
        """What to run."""
        return UniformBatch(
            self.policy,
            self.batch,
            self.prompt_len,
            self.output_len,
            kv_dtype=self.kv_dtype,
            cap=self.cap,
            scheduler=self.scheduler,
        )


DELETES = ThreePhase(Schedule(offload_from=0, recompute_from=16, offload_ratio=0.7, recompute_ratio=0.5))
HALF = StaticSplit(0.5)

CASES = (
    Case("opt-125m", "dense", 1),
    Case("opt-125m", "dense", 16),
    Case("opt-125m", "swa", 4),
    Case("opt-125m", "swa", 16, kv_dtype="int8"),
    Case("opt-125m", "sketch", 8),
    Case("opt-125m", "swa", 8, 0.4, placement="capped"),
    Case("opt-125m", "sketch", 8, 0.4, placement="capped"),
    Case("opt-125m", "dense", 4, 0.7, scheduler=HALF, placement="static 50 %"),
    Case("opt-125m", "swa", 8, 0.5, scheduler=DELETES, placement="phase III"),
    Case("opt-125m", "dense", 2, 0.5, scheduler=DELETES, placement="phase III"),
    Case("llama-gqa", "dense", 2),
    Case("llama-gqa", "swa", 1),
    Case("llama-gqa", "swa", 16),
    Case("llama-gqa", "sketch", 4),
    Case("llama-gqa", "swa", 8, 0.3, placement="capped"),
    Case("llama-gqa", "sketch", 4, 0.3, kv_dtype="int8", placement="capped"),
    Case("llama-gqa", "dense", 4, 0.7, scheduler=HALF, placement="static 50 %"),
    Case("llama-gqa", "sketch", 4, 0.5, scheduler=DELETES, placement="phase III"),
)
PARTS = ("linear_s", "attention_s", "selection_s", "transfer_s", "sampling_s", "other_s")


def predict(case: Case, run: RunResult, hardware: Hardware) -> list[tuple[StepWork, StepCost]]:
    """The same steps, from the plan alone."""
    method = RunConfig(case.policy, 0.8, "bfloat16", case.kv_dtype)
    cost = CostModel(MODELS[case.model], method, hardware)
    prompts = [case.prompt_len] * case.batch
    timeline = simulate(cost, method, run.setup.placement, run.setup.limits, prompts, case.output_len)
    return list(zip(timeline.loads, timeline.costs, strict=True))


def compare(case: Case, runs: Sequence[RunResult], hardware: Hardware) -> dict[str, object]:
    """One line of the result: the median step of each run, and of these the median."""
    steps = predict(case, runs[0], hardware)
    for run in runs:
        assert [record.prefill for record in run.records] == [load.prefill for load, _ in steps], "the plan is the run"
    decode = [[record for record in run.records if not record.prefill][SKIPPED:] for run in runs]
    said = [(load, cost) for load, cost in steps if not load.prefill][SKIPPED:]

    def measured(part: str) -> list[float]:
        return sorted(median(getattr(record, part) for record in records) * 1e3 for records in decode)

    walls = measured("wall_s")
    wall, predicted = median(walls), median(cost.overlapped_s for _, cost in said) * 1e3
    traffic = sum((record.traffic for records in decode for record in records), Traffic())
    wanted = sum(load.wanted for load, _ in said)
    fetched = sum(load.fetched + load.rebuilt for load, _ in said)
    prefill = median(sum(record.wall_s for record in run.records if record.prefill) for run in runs)
    return {
        "benchmark": "prediction",
        "kind": "prediction",
        **{key: value for key, value in asdict(case).items() if key != "scheduler"},
        "rounds": len(runs),
        "measured_ms": round(wall, 3),
        "spread_ms": [round(walls[0], 3), round(walls[-1], 3)],
        "predicted_ms": round(predicted, 3),
        "error": round(predicted / wall - 1, 4),
        "measured_parts_ms": {part: round(median(measured(part)), 3) for part in PARTS},
        "predicted_parts_ms": {part: round(median(getattr(c, part) for _, c in said) * 1e3, 3) for part in PARTS},
        "prefill_measured_s": round(prefill, 4),
        "prefill_predicted_s": round(sum(cost.overlapped_s for load, cost in steps if load.prefill), 4),
        "hit_rate_measured": round(traffic.hit_rate, 4) if traffic.lookups else None,
        "hit_rate_predicted": round(1 - fetched / wanted, 4) if wanted else None,
        "phases": sorted({str(record.phase) for records in decode for record in records}),
        "profile": hardware.where,
    }


def main() -> None:
    """Run every case in every round, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case, spread over time")
    args = parser.parse_args()
    hardware = load_profile()
    if hardware is None:
        raise SystemExit("There is no profile of this machine; run alisa profile first.")
    names = [name for name in MODELS if args.model in (None, name)]
    decoders = {name: random_decoder(MODELS[name], torch.bfloat16, torch.device("cpu"), 0) for name in names}
    cases = [case for case in CASES if case.model in names]
    directory = Path(tempfile.gettempdir())
    for name in names:
        run_uniform_batch(UniformBatch("dense", 2, 64, 8), decoders[name], directory)
    runs: dict[Case, list[RunResult]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            runs[case].append(run_uniform_batch(case.uniform, decoders[case.model], directory))
    results = [compare(case, found, hardware) for case, found in runs.items()]
    for result in results:
        measured, predicted = result["measured_parts_ms"], result["predicted_parts_ms"]
        parts = "  ".join(f"{part[:4]} {measured[part]:.1f}/{predicted[part]:.1f}" for part in PARTS)
        print(
            f"{result['model']:10}{result['policy']:7}{result['kv_dtype']:9}b{result['batch']:<3}"
            f"{result['placement']:12}{result['measured_ms']:8.1f}{result['predicted_ms']:8.1f} ms "
            f"{result['error']:+7.1%}  {parts}  hit {result['hit_rate_measured']}/{result['hit_rate_predicted']} "
            f"prefill {result['prefill_measured_s']:.2f}/{result['prefill_predicted_s']:.2f}"
        )
    errors = [abs(result["error"]) for result in results]
    print(f"{len(errors)} configurations: median error {median(errors):.1%}, worst {max(errors):.1%}")
    if args.output is not None:
        args.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
