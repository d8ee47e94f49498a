import dataclasses
import json

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.budget import state_tokens
from alisa.cli.report import prediction_line
from alisa.errors import InputError
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.lab.predict import predict
from alisa.model.loader import random_decoder
from alisa.outputs import Medium
from alisa.planner.baselines import Baselines
from alisa.planner.cost import CostModel
from alisa.planner.footprint import kv_token_bytes, policy_bytes, weight_bytes
from alisa.planner.hardware import Hardware, interpolate
from alisa.planner.load import RunConfig
from alisa.planner.presets import PRESETS
from alisa.planner.saved import load_hardware, load_profile, save_profile
from alisa.planner.search import Grid, _Pricer, search
from alisa.planner.shapes import SHAPES
from alisa.planner.simulate import MemoryBudget, UniformWorkload, room_for, simulate, simulate_uniform
from alisa.policy.registry import make_policy
from alisa.records.structure import structure
from alisa.scheduler.placement.base import Limits, Tier
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase
from tests.specs import small_spec

PAPER = UniformWorkload(64, 128, 512)
SWA = RunConfig("swa", 0.8, "float16", "float16")


def test_the_papers_cache_of_25_gib():
    assert 64 * 512 * kv_token_bytes(SHAPES["opt-13b"], "float16") == 25.0 * 2**30


def test_the_papers_first_phase_ends_near_step_76():
    # 18 GB beside the weights of OPT-30B on an 80 GB card (PAPER.md, 3.6)
    tokens = int(18e9) // kv_token_bytes(SHAPES["opt-30b"], "float16")
    assert tokens // 64 - 128 == 76
    limits = Limits(tokens, (Tier(Medium.HOST, 10**6),))
    timeline = simulate_uniform(
        CostModel(SHAPES["opt-30b"], SWA, PRESETS["h100-80gb"]), SWA, ThreePhase(), limits, PAPER
    )
    first = next(step for step, load in enumerate(timeline.loads) if load.below_tokens)
    assert abs(first - 76) <= 1


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_they_are_loaded(tied):
    spec = dataclasses.replace(small_spec(), tied_embeddings=tied)
    decoder = random_decoder(spec, torch.float32, torch.device("cpu"))
    assert weight_bytes(spec, "float32", packs_tied=True) == decoder.weight_bytes


def test_weights_in_8_bits_are_priced_by_their_own_products():
    hardware = PRESETS["h200"]
    sixteen = hardware.gemm["float16"]
    halved = tuple((size, tuple((rows, taken / 2) for rows, taken in points)) for size, points in sixteen.curves)
    hardware = dataclasses.replace(
        hardware, gemm={**hardware.gemm, "int8": dataclasses.replace(sixteen, curves=halved)}
    )
    spec, work, limits = SHAPES["opt-6.7b"], UniformWorkload(4, 64, 8), Limits(10_000)

    def linear_s(method):
        cost = CostModel(spec, method, hardware)
        return simulate(cost, method, ThreePhase(), limits, [64] * 4, 8).total().linear_s

    eight = dataclasses.replace(SWA, weight_dtype="int8")
    assert 0.5 <= linear_s(eight) / linear_s(SWA) < 0.9
    room, larger = (room_for(spec, method, hardware, work).device_bytes for method in (SWA, eight))
    # A byte for each weight, but for the table, which the logits now have a copy of.
    assert larger - room > 0.9 * spec.step_weights


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(
    "policy", ["h2o", "swa", "swa-head", "sketch", "sketch-head", "sketch-mean", "sketch-8bit", "oracle"]
)
def test_the_policys_memory_is_counted_as_it_is_taken(policy, sparsity):
    spec = small_spec(head_dim=24)
    state = make_policy(policy, sparsity).start(
        spec.attention,
        max_num_seqs=3,
        num_tokens=3 * state_tokens(700),
        max_len=700,
        device=torch.device("cpu"),
        kernels=ReferenceSelection(),
    )
    for req_idx in range(3):
        state.open(req_idx, 700)
        state.reserve(req_idx, 700)
    assert policy_bytes(spec, policy, sparsity, 3, 700) == state.nbytes > 0


def test_equal_sequences_cost_what_one_of_them_says():
    spec, hardware = SHAPES["opt-6.7b"], PRESETS["v100-16gb"]
    work, limits = UniformWorkload(8, 64, 96), Limits(8 * 90, (Tier(Medium.HOST, 8 * 200),))
    cost = CostModel(spec, SWA, hardware)
    for scheduler in (ThreePhase(), ThreePhase(schedule(10, 40, 0.5, 0.0))):
        every = simulate(cost, SWA, scheduler, limits, [64] * 8, 96).total(prefill=False)
        one = simulate_uniform(cost, SWA, scheduler, limits, work).total(prefill=False)
        sampled = simulate_uniform(cost, SWA, scheduler, limits, work, stride=4).total(prefill=False)
        assert one.serial_s == pytest.approx(every.serial_s, rel=0.02)
        assert sampled.serial_s == pytest.approx(every.serial_s, rel=0.02)


def schedule(start, later, ratio, deleted):
    return Schedule(offload_from=start, recompute_from=later, offload_ratio=ratio, recompute_ratio=deleted)


def slow_link(bytes_per_s, base="v100-16gb"):
    hardware = PRESETS[base]
    link = dataclasses.replace(hardware.read, bytes_per_s=bytes_per_s)
    return dataclasses.replace(hardware, read=link, write=link)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("below", [64, 4000])
def test_the_search_finds_what_trying_everything_finds(below, overlap):
    spec, method, work = SHAPES["opt-6.7b"], RunConfig("dense", 0.0, "float16", "float16"), UniformWorkload(2, 64, 64)
    token_bytes = kv_token_bytes(spec, "float16")
    room = MemoryBudget(150 * token_bytes, below * token_bytes)
    hardware = slow_link(2e9)
    steps = (0, 11, 22, 32, 48, 64)
    grid = Grid(steps, steps, (0.0, 0.3, 0.6, 0.8, 1.0), (0.0, 0.5, 1.0))
    found = search(spec, work, hardware, [method], room=room, overlap=overlap)
    pricer = _Pricer(spec, hardware, overlap, room)
    everything = [
        price
        for batch in (2, 1)
        for candidate in grid.schedules()
        if (price := pricer.price(work, batch, method, ThreePhase(candidate))) is not None
    ]
    best = min(pricer.seconds(candidate) for candidate in everything)
    assert found.best.seconds(overlap=overlap) <= best * (1 + 1e-9)
    # the same grid, exactly
    same = search(spec, work, hardware, [method], room=room, overlap=overlap, grid=grid)
    assert same.best.seconds(overlap=overlap) <= best * (1 + 1e-9)


def test_deleting_is_chosen_where_it_pays_and_explained_where_it_does_not():
    spec, work = SHAPES["opt-6.7b"], UniformWorkload(1, 256, 256)
    dense = RunConfig("dense", 0.0, "float16", "float16")
    token_bytes = kv_token_bytes(spec, "float16")
    short = search(spec, work, PRESETS["v100-16gb"], [dense], room=MemoryBudget(240 * token_bytes, 250 * token_bytes))
    assert short.best.timeline.loads[-1].deleted_tokens > 0
    assert "deleted" in short.notes[-1]
    ample = search(spec, work, PRESETS["v100-16gb"], [SWA], room=MemoryBudget(240 * token_bytes, 2000 * token_bytes))
    assert ample.best.timeline.loads[-1].deleted_tokens == 0
    assert "beta = 0" in ample.notes[-1]
    nothing = search(spec, work, PRESETS["v100-16gb"], [SWA], room=MemoryBudget(240 * token_bytes, 40 * token_bytes))
    assert nothing is None


def test_a_paper_sized_search_is_small():
    found = search(SHAPES["opt-13b"], PAPER, PRESETS["v100-32gb"], [SWA, dataclasses.replace(SWA, kv_dtype="int8")])
    assert found.num_priced < 400


def test_baselines_agree_where_everything_fits_and_order_where_it_does_not():
    easy = Baselines(SHAPES["opt-6.7b"], "float16", PRESETS["h200"], UniformWorkload(4, 128, 64)).all()
    assert easy[0].seconds == pytest.approx(easy[2].seconds, rel=0.05)
    assert easy[0].seconds == pytest.approx(easy[1].seconds, rel=0.05)
    hard = {
        found.name: found.seconds
        for found in Baselines(SHAPES["opt-13b"], "float16", PRESETS["v100-32gb"], PAPER).all()
    }
    assert hard["static split (FlexGen-like)"] < hard["whole layers (Accelerate-like)"]
    assert hard["block paging, swap (vLLM-like)"] < hard["all-device"]
    none = Baselines(SHAPES["opt-30b"], "float16", PRESETS["v100-16gb"], PAPER).all()
    assert all(found.seconds is None for found in none)


def test_a_machine_survives_json(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(dataclasses.asdict(PRESETS["h200"])))
    assert load_hardware(path) == PRESETS["h200"]
    path.write_text('{"name": "x"}')
    with pytest.raises(InputError, match="does not describe a machine"):
        load_hardware(path)
    with pytest.raises(InputError, match="overlap is 'much', a number is needed"):
        structure(Hardware, dataclasses.asdict(PRESETS["h200"]) | {"overlap": "much"})


def test_a_profile_with_another_stamp_is_not_used(tmp_path, monkeypatch):
    path = save_profile(PRESETS["h200"], "2026-01-01", tmp_path / "deep" / "profile.json")
    assert load_profile(path) == PRESETS["h200"]
    assert load_hardware(path) == PRESETS["h200"]
    monkeypatch.setattr("alisa.planner.saved.__version__", "0.0.0")
    assert load_profile(path) is None
    assert load_profile(tmp_path / "missing.json") is None


def test_a_profile_without_the_prices_of_a_policy_is_not_used(tmp_path):
    hardware = PRESETS["h200"]
    fewer = {kind: prices for kind, prices in hardware.selection.items() if kind != "sketch-keys"}
    path = save_profile(dataclasses.replace(hardware, selection=fewer), "2026-01-01", tmp_path / "profile.json")
    assert load_profile(path) is None
    with pytest.raises(InputError, match="no prices of sketch-keys"):
        load_hardware(path)


def test_interpolation_is_exact_on_points_and_proportional_beyond():
    points = ((1.0, 2.0), (4.0, 8.0), (16.0, 8.0))
    assert interpolate(points, 2) == pytest.approx(4.0)
    assert [interpolate(points, x) for x in (0.5, 1, 4, 8, 16, 32)] == pytest.approx([2, 2, 8, 8, 8, 16])


def test_a_run_can_be_compared_with_what_it_should_have_cost(report):
    hardware = dataclasses.replace(PRESETS["h200"], gemm={"float32": PRESETS["h200"].gemm["float16"]})
    assert predict(report, hardware) is None  # nothing is known of rows in float32
    rows = dict.fromkeys(("float32", "int8"), PRESETS["h200"].attention["float16"])
    predicted = predict(report, dataclasses.replace(hardware, attention=rows))
    assert predicted.linear_s > 0
    text = prediction_line(report.summary, predicted)[1]
    assert "measured" in text
    assert "alisa profile" in prediction_line(report.summary, None)[1]


@pytest.fixture
def report():
    llm = LLM(dtype="float32", kv_device_memory="2MiB")
    return llm.generate([[1, 2, 3] * 20] * 3, SamplingParams(max_tokens=40, ignore_eos=True)).report
