"""A selection that is read in pieces, and a sequence in other company, give the same bits: every set of kernels."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.kernels.base import Attended, Ranking
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.decode import ReferenceDecode
from alisa.kernels.reference.sketch import make_sketch
from tests.kernels.cases import ISAS, ROW_DTYPES, kernels, make_problem
from tests.kernels.triton_device import moved, on_each_device, triton_kernels


def assert_equal_bits(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def attend_in_pieces(kernel, problem, seed):
    """As one selection whose rows are read through another piece of memory each time, cut at random."""
    counts = problem.counts.tolist()
    draw = random.Random(seed)
    step = kernel.piece_columns(problem.codec.format, problem.q.shape[1])
    pieces = kernel.in_pieces(problem.q, problem.codec, problem.counts, problem.slots.shape[2])
    begins = torch.zeros_like(problem.counts)
    while begins.tolist() != counts:
        # Some sequences go on, by one or several of the smallest pieces.
        ends = [
            min(begin + step * draw.randint(0, 3), count) for begin, count in zip(begins.tolist(), counts, strict=True)
        ]
        ends = torch.tensor(ends, dtype=torch.int32).to(begins.device)
        rows, slots = problem.rows.clone(), problem.slots.clone()
        columns = torch.arange(slots.shape[2], device=slots.device)
        slots[((columns < begins[:, None]) | (columns >= ends[:, None]))[:, None]] = 0
        pieces.add(rows, slots, begins, ends)
        rows.fill_(255)  # the memory has another use now
        begins = ends
    return pieces.finish()


@st.composite
def long_problems(draw, longest=900):
    """Up to three sequences, some of them longer than an item of work."""
    num_seqs = draw(st.integers(1, 3))
    counts = [draw(st.sampled_from([1, 64, 65, 256, 257, longest]) | st.integers(1, longest)) for _ in range(num_seqs)]
    return make_problem(
        draw(st.sampled_from(ROW_DTYPES)),
        num_seqs=num_seqs,
        num_rows=longest,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([7, 16, 64, 128])),
        q_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        counts=counts,
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(), seed=st.integers(0, 99))
def test_native_pieces_are_the_whole(isa, problem, seed):
    kernel = kernels(isa)
    assert_equal_bits(attend_in_pieces(kernel, problem, seed), kernel(*problem.args()))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(longest=300), seed=st.integers(0, 99))
def test_plain_pieces_are_the_whole(problem, seed):
    kernel = ReferenceDecode()
    assert_equal_bits(attend_in_pieces(kernel, problem, seed), kernel(*problem.args()))


@on_each_device
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(), seed=st.integers(0, 99))
def test_triton_pieces_are_the_whole(device, problem, seed):
    kernel = triton_kernels()
    problem.q, problem.counts = problem.q.to(device), problem.counts.to(device)
    problem.rows, problem.slots = moved(problem.rows, device), problem.slots.to(device)
    assert_equal_bits(attend_in_pieces(kernel, problem, seed), kernel(*problem.args()))


def shared(problem, seed):
    """(queries, entries, counts, slots): some queries for each sequence of a problem, which read beginnings of it."""
    draw = random.Random(seed)
    entries = [entry for entry in range(len(problem.counts)) for _ in range(draw.randint(1, 6))]
    counts = [draw.randint(1, int(problem.counts[entry])) for entry in entries]
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(len(entries), *problem.q.shape[1:], generator=generator).to(problem.q.dtype)
    return queries, torch.tensor(entries, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)


def assert_sharing_changes_no_bit(kernel, problem, seed, device="cpu"):
    queries, entries, counts = (part.to(device) for part in shared(problem, seed))
    own = problem.slots.index_select(0, entries)
    expected = kernel(queries, problem.rows, problem.codec, own, counts)
    found = kernel(queries, problem.rows, problem.codec, problem.slots, counts, None, entries)
    assert_equal_bits(found, expected)
    pieces = kernel.in_pieces(queries, problem.codec, counts, own.shape[2], None, entries)
    step = kernel.piece_columns(problem.codec.format, problem.q.shape[1])
    begins = torch.zeros_like(problem.counts)
    while not torch.equal(begins, problem.counts):
        ends = torch.minimum(begins + step * (1 + seed % 3), problem.counts)
        pieces.add(problem.rows, problem.slots, begins, ends)
        begins = ends
    assert_equal_bits(pieces.finish(), expected)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(), seed=st.integers(0, 99))
def test_native_queries_that_share_rows_get_the_bits_of_their_own(isa, problem, seed):
    assert_sharing_changes_no_bit(kernels(isa), problem, seed)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(longest=300), seed=st.integers(0, 99))
def test_plain_queries_that_share_rows_get_the_bits_of_their_own(problem, seed):
    assert_sharing_changes_no_bit(ReferenceDecode(), problem, seed)


@on_each_device
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=long_problems(longest=300), seed=st.integers(0, 99))
def test_triton_queries_that_share_rows_get_the_bits_of_their_own(device, problem, seed):
    problem.q, problem.counts = problem.q.to(device), problem.counts.to(device)
    problem.rows, problem.slots = moved(problem.rows, device), problem.slots.to(device)
    assert_sharing_changes_no_bit(triton_kernels(), problem, seed, device)


def alone(problem, seq):
    """One sequence of a problem, with nothing beside it."""
    count = int(problem.counts[seq])
    return (
        problem.q[seq : seq + 1],
        problem.rows,
        problem.codec,
        problem.slots[seq : seq + 1, :, :count].contiguous(),
        problem.counts[seq : seq + 1],
    )


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("plain", [False, True])
def test_company_and_threads_change_no_bit(row_dtype, plain, head_dim):
    if not plain and not library.available():
        pytest.skip(library.unavailable_reason())
    problem = make_problem(
        row_dtype, num_seqs=5, num_rows=3000, counts=[3000, 700, 300, 129, 1], group=2, head_dim=head_dim
    )
    team = [ReferenceDecode()] if plain else [cpu.CpuKernels(num_threads=count) for count in (1, 2, 7)]
    expected = team[0](*problem.args())
    for kernel in team:
        assert_equal_bits(kernel(*problem.args()), expected)
        for seq, count in enumerate(problem.counts.tolist()):
            wanted = Attended(
                expected.out[seq : seq + 1],
                expected.mass[seq : seq + 1, :, :count],
                expected.log_sum_exp[seq : seq + 1],
            )
            assert_equal_bits(kernel(*alone(problem, seq)), wanted)


def flat(completed):
    return *completed.chosen, completed.rest


@pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
@pytest.mark.parametrize("covered", [None, (0.3, 0.3, 0.3), (0.0, 0.3, 0.9)])
def test_a_sketch_gives_the_same_bits_in_any_company_and_on_any_threads(covered):
    coverages = None if covered is None else torch.tensor(covered, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([2000, 300, 31], dtype=torch.int32)
    starts = torch.tensor([0, 2000, 2300])
    keys = torch.randn(2331, 2, 64, generator=generator)
    query = torch.randn(3, 6, 64, generator=generator).to(torch.bfloat16)
    sketched, values = make_sketch(keys, 4), make_sketch(keys.flip(0), 2)
    budgets = [torch.tensor(column, dtype=torch.int32) for column in ([1800, 270, 20], [200, 30, 20], [400, 60, 31])]
    expected = cpu.CpuKernels(num_threads=1).sketch_scores(query, sketched, starts, lengths, 2000, 2)
    together = Ranking(starts, lengths, *budgets, 400, 2000, 1, coverages=coverages)
    whole = cpu.CpuKernels(num_threads=1).sketch_complete(query, sketched, values, together)
    for num_threads in (1, 2, 7):
        kernel = cpu.CpuKernels(num_threads=num_threads)
        assert torch.equal(kernel.sketch_scores(query, sketched, starts, lengths, 2000, 2), expected)
        again = kernel.sketch_complete(query, sketched, values, together)
        assert all(map(torch.equal, flat(again), flat(whole)))
        for seq in range(3):
            one = slice(seq, seq + 1)
            found = kernel.sketch_scores(query[one], sketched, starts[one], lengths[one], 2000, 2)
            assert torch.equal(found, expected[one])
            own = [column[one] for column in budgets]
            of_it = None if coverages is None else coverages[one]
            ranking = Ranking(starts[one], lengths[one], *own, 400, 2000, 1, coverages=of_it)
            alone = kernel.sketch_complete(query[one], sketched, values, ranking)
            assert all(torch.equal(mine, of_all[one]) for mine, of_all in zip(flat(alone), flat(whole), strict=True))
