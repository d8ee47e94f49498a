"""What `alisa plan` would have said against what happened: decode steps of random models, predicted from the profile.

None of these configurations was used to fit the profile, which measures parts in isolation. Each line is one run; the
error is that of the mean decode step. Run `alisa profile` first, on an idle machine, and then, still idle:

    python benchmarks/prediction.py --output benchmarks/results/prediction.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from alisa.config import PolicyName, SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.kernels import choose_kernels
from alisa.engine.memory import Caps, Memory, make_memory
from alisa.engine.placement import Placement
from alisa.engine.recorder import Stopwatch
from alisa.engine.requests import Request
from alisa.engine.runner import Runner
from alisa.kv.codec import make_codec
from alisa.model.decoder import Decoder
from alisa.model.loader import random_decoder
from alisa.planner.cost import CostModel, StepCost
from alisa.planner.hardware import Hardware
from alisa.planner.load import Load, Method
from alisa.planner.saved import load_profile
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import simulate
from alisa.policy.table import make_policy
from alisa.schedule.base import Scheduler
from alisa.schedule.static import StaticSplit
from alisa.schedule.three_phase import Schedule, ThreePhase
from alisa.spec import ModelSpec, Rope
from alisa.types import RowFormat, StepRecord

SMALL_LLAMA = ModelSpec(
    family="llama",
    num_layers=10,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=2816,
    vocab_size=32000,
    max_positions=2048,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=Rope(10000.0, 64),
    tied_embeddings=False,
)
MODELS = {"opt-125m": SHAPES["opt-125m"], "llama-gqa": SMALL_LLAMA}
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
    kv_dtype: str = "bfloat16"
    scheduler: Scheduler | None = None
    placement: str = "device"
    prompt_len: int = 192
    output_len: int = 64


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


def run(case: Case, decoder: Decoder) -> tuple[list[StepRecord], Memory]:
    """All steps of one batch, and the memory it had."""
    spec = decoder.spec
    length = case.prompt_len + case.output_len - 1
    policy = make_policy(case.policy, 0.8)
    codec = make_codec(RowFormat(case.kv_dtype, spec.num_kv_heads, spec.head_dim))
    kernels = choose_kernels(decoder.device)
    total = case.batch * length * spec.num_layers * codec.format.row_bytes
    caps = Caps(int(case.cap * total), 0, 2 * total, Path(tempfile.gettempdir()))
    memory = make_memory(decoder, policy, codec, kernels, [length] * case.batch, caps, case.scheduler, case.batch)
    state = policy.start(spec, case.batch, length, decoder.device, kernels.selection)
    uses_tiers = memory.scheduler.uses_tiers
    runner = Runner(decoder, policy, memory.store, state, kernels.attend, Stopwatch(), looks_ahead=uses_tiers)
    placement = Placement(memory.scheduler, memory.limits, memory.store, policy)
    engine = Engine(runner, placement, eos_ids=frozenset(), prefill_chunk=1024)
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=case.output_len, ignore_eos=True)
    for index in range(case.batch):
        ids = torch.randint(10, spec.vocab_size, (case.prompt_len,), generator=generator).tolist()
        engine.submit(Request(index, tuple(ids), params, case.output_len))
    records = []
    while (result := engine.step()) is not None:
        records.append(result.record)
    memory.store.close()
    return records, memory


def predict(case: Case, memory: Memory, hardware: Hardware) -> list[tuple[Load, StepCost]]:
    """The same steps, from the plan alone."""
    method = Method(case.policy, 0.8, "bfloat16", case.kv_dtype)
    cost = CostModel(MODELS[case.model], method, hardware)
    prompts = [case.prompt_len] * case.batch
    timeline = simulate(cost, method, memory.scheduler, memory.limits, prompts, case.output_len)
    return list(zip(timeline.loads, timeline.costs, strict=True))


def compare(case: Case, records: Sequence[StepRecord], steps: Sequence[tuple[Load, StepCost]]) -> dict[str, object]:
    """One line of the result."""
    assert [record.prefill for record in records] == [load.prefill for load, _ in steps], "the plan is the run"
    decode = [(record, cost, load) for record, (load, cost) in zip(records, steps, strict=True) if not record.prefill]
    decode = decode[SKIPPED:]
    measured = {part: fmean(getattr(record, part) for record, _, _ in decode) * 1e3 for part in PARTS}
    predicted = {part: fmean(getattr(cost, part) for _, cost, _ in decode) * 1e3 for part in PARTS}
    wall = fmean(record.wall_s for record, _, _ in decode) * 1e3
    said = fmean(cost.overlapped_s for _, cost, _ in decode) * 1e3
    prefill = sum(record.wall_s for record in records if record.prefill)
    prefill_said = sum(cost.overlapped_s for load, cost in steps if load.prefill)
    lookups = sum(record.traffic.lookups for record, _, _ in decode)
    hits = sum(record.traffic.hits for record, _, _ in decode)
    layers = MODELS[case.model].num_layers
    wanted = sum(load.wanted for _, _, load in decode) * layers
    fetched = sum(load.fetched + load.rebuilt for _, _, load in decode) * layers
    return {
        "benchmark": "prediction",
        "kind": "prediction",
        **{key: value for key, value in asdict(case).items() if key != "scheduler"},
        "measured_ms": round(wall, 3),
        "predicted_ms": round(said, 3),
        "error": round(said / wall - 1, 4),
        "measured_parts_ms": {part: round(value, 3) for part, value in measured.items()},
        "predicted_parts_ms": {part: round(value, 3) for part, value in predicted.items()},
        "prefill_measured_s": round(prefill, 4),
        "prefill_predicted_s": round(prefill_said, 4),
        "hit_rate_measured": round(hits / lookups, 4) if lookups else None,
        "hit_rate_predicted": round(1 - fetched / wanted, 4) if wanted else None,
        "wanted_measured": lookups,
        "wanted_predicted": round(wanted),
        "phases": sorted({str(record.phase) for record, _, _ in decode}),
    }


def main() -> None:
    """Run every case and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", choices=MODELS)
    args = parser.parse_args()
    hardware = load_profile()
    if hardware is None:
        raise SystemExit("There is no profile of this machine; run alisa profile first.")
    results = []
    for name, spec in MODELS.items():
        if args.model not in (None, name):
            continue
        decoder = random_decoder(spec, torch.bfloat16, torch.device("cpu"), 0)
        run(Case(name, "dense", 2, output_len=8), decoder)
        for case in (case for case in CASES if case.model == name):
            records, memory = run(case, decoder)
            result = compare(case, records, predict(case, memory, hardware))
            results.append(result)
            parts = "  ".join(
                f"{part[:4]} {result['measured_parts_ms'][part]:.1f}/{result['predicted_parts_ms'][part]:.1f}"
                for part in PARTS
            )
            print(
                f"{case.model:10}{case.policy:7}{case.kv_dtype:9}b{case.batch:<3}{case.placement:12}"
                f"{result['measured_ms']:8.1f}{result['predicted_ms']:8.1f} ms {result['error']:+7.1%}  {parts}  hit "
                f"{result['hit_rate_measured']}/{result['hit_rate_predicted']} "
                f"{result['wanted_measured']}/{result['wanted_predicted']} "
                f"prefill {result['prefill_measured_s']:.2f}/{result['prefill_predicted_s']:.2f}",
                flush=True,
            )
    errors = [abs(result["error"]) for result in results]
    print(f"{len(errors)} configurations: median error {median(errors):.1%}, worst {max(errors):.1%}")
    if args.output is not None:
        args.output.write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
