"""Prices corrected by whole steps: a machine whose parts are slower in a step by known factors is found again."""

from dataclasses import replace

import pytest
import torch

from alisa.lab.bench.uniform_batch import UniformBatch, run_uniform_batch
from alisa.model.loader import random_decoder
from alisa.outputs import Medium
from alisa.planner.cost import CostModel
from alisa.planner.load import RunConfig
from alisa.planner.presets import PRESETS
from alisa.planner.profile.correction import Observation, corrected
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import simulate
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits, Tier
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase
from tests.specs import small_spec

ALONE = replace(PRESETS["v100-16gb"], overlap=0.0, write_overlap=0.0, place_s=1e-5, lookup_row_s=2e-8)
SPEC = replace(SHAPES["opt-125m"], num_layers=6)
SLOWER = {"linear": 1.5, "attention": 2.0, "selection": 3.0, "lookup": 1.25, "row": 1.4}
CALL_S = 4e-5
CHOOSE_S = 2e-6
WAIT_S = 3e-4


def observe(policy, batch, scheduler, limits):
    cost = CostModel(SPEC, RunConfig(policy, 0.8, "bfloat16", "bfloat16"), ALONE)
    timeline = simulate(cost, cost.method, scheduler, limits, [96] * batch, 8)
    decode = [(load, price) for load, price in zip(timeline.loads, timeline.costs, strict=True) if not load.prefill]
    load, price = decode[-1]
    waits = cost.waits(load)
    rows_s = price.fetch_s + price.rebuild_s - SPEC.num_layers * waits * ALONE.read.call_s
    return Observation(
        num_layers=SPEC.num_layers,
        batch=batch,
        chooser=cost.chooser,
        tiers=scheduler.uses_tiers,
        waits=waits,
        predicted=price,
        linear_s=SLOWER["linear"] * price.linear_s,
        attention_s=SLOWER["attention"] * price.attention_s + SPEC.num_layers * CALL_S,
        selection_s=SLOWER["selection"] * price.selection_s + SPEC.num_layers * CHOOSE_S,
        transfer_s=SLOWER["lookup"] * price.lookup_s + SPEC.num_layers * waits * WAIT_S + SLOWER["row"] * rows_s,
        other_s=7e-4,
    )


def observations():
    capped = Limits(200, (Tier(Medium.DISK, 4000),))
    roomy = Limits(100_000)
    deletes = ThreePhase(Schedule(offload_from=0, recompute_from=2, offload_ratio=0.7, recompute_ratio=0.4))
    return [
        *(observe(policy, batch, AllDevice(), roomy) for policy in ("dense", "swa", "sketch") for batch in (1, 4, 16)),
        observe("swa", 4, ThreePhase(), capped),
        observe("sketch", 4, ThreePhase(), capped),
        observe("dense", 2, StaticSplit(0.6), capped),
        observe("dense", 4, StaticSplit(0.6), capped),
        observe("swa", 2, deletes, replace(capped, rebuildable=200)),
    ]


def test_the_factors_are_found_again():
    found = corrected(ALONE, "bfloat16", observations())
    before, after = ALONE.attention["int8"], found.attention["int8"]
    assert after.byte_s == pytest.approx(SLOWER["attention"] * before.byte_s, rel=1e-3)
    assert after.call_s == pytest.approx(SLOWER["attention"] * before.call_s + CALL_S, rel=1e-3)
    for weights in (768 * 768, 3072 * 768):
        for rows in (1, 3, 16, 64):
            ratio = found.gemm["bfloat16"].seconds(rows, weights) / ALONE.gemm["bfloat16"].seconds(rows, weights)
            assert ratio == pytest.approx(SLOWER["linear"], rel=0.1)
    assert found.gemm["float16"] == ALONE.gemm["float16"], "nothing is known about other dtypes"
    assert found.lookup_row_s == pytest.approx(SLOWER["lookup"] * ALONE.lookup_row_s, rel=0.05)
    assert found.read.call_s == pytest.approx(WAIT_S, rel=0.05)
    assert found.read.bytes_per_s == pytest.approx(ALONE.read.bytes_per_s / SLOWER["row"], rel=0.05)
    assert found.step_s == pytest.approx(7e-4)
    # Least squares in float64 on columns of about one size: a condition below 1e6 costs 1e6 times 2^-53 = 1e-10.
    assert found.write_overlap == pytest.approx(1, abs=1e-9), "storing cost nothing"


def test_a_step_priced_after_the_correction_costs_what_was_observed():
    found = corrected(ALONE, "bfloat16", observations())
    cost = CostModel(SPEC, RunConfig("swa", 0.8, "bfloat16", "bfloat16"), found)
    timeline = simulate(cost, cost.method, AllDevice(), Limits(100_000), [96] * 4, 8)
    seen = observe("swa", 4, AllDevice(), Limits(100_000))
    last = timeline.costs[-1]
    assert last.linear_s == pytest.approx(seen.linear_s, rel=0.1)
    assert last.attention_s == pytest.approx(seen.attention_s, rel=0.01)
    assert last.selection_s == pytest.approx(seen.selection_s, rel=0.01)


def test_a_trial_runs_what_it_says(tmp_path):
    decoder = random_decoder(small_spec(), torch.float32, torch.device("cpu"), 0)
    run = run_uniform_batch(UniformBatch("swa", 3, 12, 6, kv_dtype="float32", cap=0.8), decoder, tmp_path)
    assert run.setup.placement.uses_tiers
    assert run.setup.limits.device_tokens < 3 * 17
    assert sum(record.num_tokens for record in run.records if record.prefill) == 3 * 12
    assert sum(record.num_tokens for record in run.records if not record.prefill) == 3 * 5
    whole = run_uniform_batch(UniformBatch("dense", 1, 12, 2, kv_dtype="float32"), decoder, tmp_path)
    assert not whole.setup.placement.uses_tiers
    assert list(tmp_path.iterdir()) == []
