"""Selection against a stable sort, native and in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.selection import ReferenceSelection

KERNELS = pytest.mark.parametrize(
    "kernels",
    [
        ReferenceSelection,
        pytest.param(
            cpu.CpuKernels,
            marks=pytest.mark.skipif(not library.available(), reason=library.unavailable_reason() or "is there"),
        ),
    ],
)


def by_sorting(scores, lane, older_end, older, count, num_slots):
    """Of equal scores the older position comes first: a stable descending sort."""
    order = scores[lane, :older_end].sort(descending=True, stable=True).indices[:older].sort().values
    chosen = order.tolist() + list(range(older_end, older_end + count - older))
    return chosen + [0] * (num_slots - count)


@st.composite
def scores_of_all_kinds(draw, max_num_seqs, capacity):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scores = torch.rand(max_num_seqs, capacity, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["even", "steep", "ties", "zeros", "tiny negative", "huge"]))
    if kind == "steep":
        scores = scores**40
    elif kind == "ties":
        scores = (scores * 4).floor()
    elif kind == "zeros":
        scores *= torch.rand(scores.shape, generator=generator) < 0.1
    elif kind == "tiny negative":
        scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.5, scores * -1e-17, scores * 1e-17)
    elif kind == "huge":
        scores *= 1e30
    return scores.to(draw(st.sampled_from([torch.float64, torch.float32])))


@KERNELS
@settings(max_examples=150)
@given(data=st.data())
def test_selection_is_a_stable_sort(kernels, data):
    max_num_seqs, capacity = 5, data.draw(st.sampled_from([8, 70, 600]))
    scores = data.draw(scores_of_all_kinds(max_num_seqs, capacity))
    lanes = data.draw(st.permutations(range(max_num_seqs)))[: data.draw(st.integers(1, max_num_seqs))]
    older_ends = [data.draw(st.integers(0, capacity - 1)) for _ in lanes]
    older = [data.draw(st.integers(0, end)) for end in older_ends]
    counts = [o + data.draw(st.integers(1, capacity - end)) for o, end in zip(older, older_ends, strict=True)]
    num_slots = max(counts) + data.draw(st.integers(0, 2))
    positions = kernels().select(
        scores.view(-1),
        torch.tensor(lanes) * capacity,
        *(torch.tensor(values, dtype=torch.int32) for values in (older_ends, older, counts)),
        num_slots,
        max(older_ends),
    )
    expected = [by_sorting(scores, *row, num_slots) for row in zip(lanes, older_ends, older, counts, strict=True)]
    assert positions.tolist() == expected


@KERNELS
def test_observe_adds_to_sums_and_buckets(kernels):
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(4, 50, generator=generator, dtype=torch.float64)
    buckets = torch.rand(3, 4, 50, generator=generator)
    lanes, bucket_of, counts = [2, 0], [1, 2], [7, 5]
    positions = torch.stack([torch.randperm(50, generator=generator)[:7].sort().values for _ in lanes]).int()
    mass = torch.rand(2, 7, generator=generator)
    expected_sums, expected_buckets = sums.clone(), buckets.clone()
    for row, (lane, bucket, count) in enumerate(zip(lanes, bucket_of, counts, strict=True)):
        chosen = positions[row, :count].long()
        expected_sums[lane, chosen] += mass[row, :count].double()
        expected_buckets[bucket, lane, chosen] += mass[row, :count]
    kernels().observe(
        sums,
        buckets,
        torch.tensor([lane * 50 for lane in lanes]),
        torch.tensor([(bucket * 4 + lane) * 50 for bucket, lane in zip(bucket_of, lanes, strict=True)]),
        positions,
        torch.tensor(counts, dtype=torch.int32),
        mass,
    )
    assert torch.equal(sums, expected_sums)
    assert torch.equal(buckets, expected_buckets)
