"""Triton selection against a stable sort, sketch scores against the definition, observe against an indexed sum."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.kernels.base import Chosen, Completed, Ranking, Sketch
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sketch import sketch_scores
from tests.kernels.test_select import by_sorting, scores_of_all_kinds
from tests.kernels.test_sketch import assert_agrees as assert_sketch_agrees
from tests.kernels.test_sketch import assert_chosen, assert_completed, budgets_of, valued_problems
from tests.kernels.test_sketch import make_problem as make_sketch_problem
from tests.kernels.test_sketch import problems as sketch_problems
from tests.kernels.triton_device import on_each_device, triton_kernels


@on_each_device
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_selection_is_a_stable_sort(device, data):
    max_num_seqs, capacity = 4, data.draw(st.sampled_from([8, 70, 600]))
    scores = data.draw(scores_of_all_kinds(max_num_seqs, capacity))
    lanes = data.draw(st.permutations(range(max_num_seqs)))[: data.draw(st.integers(1, 2))]
    older_ends = [data.draw(st.integers(0, capacity - 1)) for _ in lanes]
    older = [data.draw(st.integers(0, end)) for end in older_ends]
    counts = [o + data.draw(st.integers(1, capacity - end)) for o, end in zip(older, older_ends, strict=True)]
    num_slots = max(counts) + data.draw(st.integers(0, 2))
    positions = triton_kernels().select(
        scores.to(device).view(-1),
        torch.tensor(lanes, device=device) * capacity,
        *(torch.tensor(values, dtype=torch.int32, device=device) for values in (older_ends, older, counts)),
        num_slots,
        max(older_ends),
    )
    expected = [by_sorting(scores, *row, num_slots) for row in zip(lanes, older_ends, older, counts, strict=True)]
    assert positions.tolist() == expected


@on_each_device
def test_a_row_of_several_tiles_keeps_the_tie_rule(device):
    scores = torch.randint(0, 4, (2, 9000), generator=torch.Generator().manual_seed(0)).float()
    row = (1, 8900, 5000, 5050)
    positions = triton_kernels().select(
        scores.to(device).view(-1),
        torch.tensor(row[:1], device=device) * 9000,
        *(torch.tensor([value], dtype=torch.int32, device=device) for value in row[1:]),
        5060,
        8900,
    )
    assert positions.tolist() == [by_sorting(scores, *row, 5060)]


@on_each_device
def test_observe_adds_to_sums_and_buckets(device):
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(4, 500, generator=generator, dtype=torch.float64)
    buckets = torch.rand(3, 4, 500, generator=generator)
    lanes, bucket_of, counts = [2, 0], [1, 2], [300, 5]
    positions = torch.stack([torch.randperm(500, generator=generator)[:300].sort().values for _ in lanes]).int()
    mass = torch.rand(2, 300, generator=generator)
    expected_sums, expected_buckets = sums.clone(), buckets.clone()
    for row, (lane, bucket, count) in enumerate(zip(lanes, bucket_of, counts, strict=True)):
        chosen = positions[row, :count].long()
        expected_sums[lane, chosen] += mass[row, :count].double()
        expected_buckets[bucket, lane, chosen] += mass[row, :count]
    sums, buckets = sums.to(device), buckets.to(device)
    triton_kernels().observe(
        sums,
        buckets,
        torch.tensor([lane * 500 for lane in lanes], device=device),
        torch.tensor([(bucket * 4 + lane) * 500 for bucket, lane in zip(bucket_of, lanes, strict=True)], device=device),
        positions.to(device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        mass.to(device),
    )
    assert torch.equal(sums.cpu(), expected_sums)
    assert torch.equal(buckets.cpu(), expected_buckets)


def on(device, arguments):
    """The arguments of a call on a device."""

    def moved(value):
        if isinstance(value, Sketch):
            return value._replace(codes=value.codes.to(device), ranges=value.ranges.to(device))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return [moved(value) for value in arguments]


def score(problem, device):
    return triton_kernels().sketch_scores(*on(device, problem.args())).cpu()


@on_each_device
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(problem=sketch_problems(scales=(1e-3, 1.0, 5.0), most=1))
def test_sketch_scores_are_the_definition(device, problem):
    assert_sketch_agrees(score(problem, device), problem)


@on_each_device
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(problem=sketch_problems(scales=(0.0, 1e-30, 1e4), most=1))
def test_extreme_sketches_stay_finite(device, problem):
    weights = score(problem, device)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    heads = torch.full((len(weights),), float(problem.query.shape[1]))
    torch.testing.assert_close(weights.sum(dim=(1, 2)), heads)


@on_each_device
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("per_head", "group"), [(False, 1), (True, 3)])
def test_sketch_scores_are_the_twins(device, bits, per_head, group):
    problem = make_sketch_problem(bits, lengths=[300, 41], group=group, per_head=per_head)
    fast = score(problem, device)
    problem.keys.ranges[problem.keys.ranges.isnan()] = 0  # the reference gathers them
    torch.testing.assert_close(fast, sketch_scores(*problem.args()), rtol=1e-4, atol=1e-7)


@on_each_device
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(problem=sketch_problems(most=1), data=st.data())
def test_what_is_chosen_and_its_shares(device, problem, data):
    budgets = budgets_of(problem, data)
    query, keys, *rows = problem.args()[:4]
    query, keys, *ranking = on(device, (query, keys, *rows, *budgets, problem.width, problem.num_sets, problem.softcap))
    found = triton_kernels().sketch_select(query, keys, Ranking(*ranking))
    assert_chosen(Chosen(*(table.cpu() for table in found)), problem, score(problem, device), budgets)


@on_each_device
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])
@given(valued=valued_problems(most=1), data=st.data())
def test_what_is_not_read_is_added_up_from_the_sketched_values(device, valued, data):
    problem, values = valued
    budgets = budgets_of(problem, data)
    query, keys, *rows = problem.args()[:4]
    moved = on(device, (query, keys, values, *rows, *budgets, problem.width, problem.num_sets, problem.softcap))
    query, keys, values_there, *ranking = moved
    found = triton_kernels().sketch_complete(query, keys, values_there, Ranking(*ranking))
    chosen = Chosen(*(table.cpu() for table in found.chosen))
    assert_completed(Completed(chosen, found.rest.cpu()), problem, values, budgets)


@on_each_device
def test_blending_is_the_twins_and_leaves_what_was_read_in_full(device):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(3, 5, 17, generator=generator).bfloat16()
    shares, rest = torch.rand(3, 5, generator=generator), torch.randn(3, 5, 17, generator=generator)
    shares[1, 2:], rest[1, 2:] = 1.0, 0.0
    blended = triton_kernels().rest_blend(*on(device, (out, shares, rest))).cpu()
    twins = ReferenceSelection().rest_blend(out, shares, rest)
    torch.testing.assert_close(blended, twins, rtol=torch.finfo(out.dtype).eps, atol=1e-6)
    assert torch.equal(blended[1, 2:], out[1, 2:])
