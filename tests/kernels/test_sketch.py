"""Native key sketches: codes of the torch reference bit for bit, weights of the definition, and the same tokens
chosen."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alisa.kernels.base import Ranking, Sketch
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sketch import make_sketch, sketch_rows, sketch_scores, sketch_weights, unsketch
from tests.kernels.cases import SKETCH_ISAS, kernels
from tests.kernels.test_select import by_sorting

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


@dataclass
class Problem:
    query: torch.Tensor
    keys: Sketch
    starts: torch.Tensor
    lengths: torch.Tensor
    width: int
    num_sets: int
    softcap: float | None = None

    def args(self):
        return tuple(vars(self).values())


def make_problem(
    bits,
    *,
    lengths,
    kv_heads=2,
    group=2,
    head_dim=64,
    parts=1,
    per_head=False,
    softcap=None,
    dtype=torch.float32,
    scale=1.0,
    offset=0.0,
    seed=0,
):
    """Sequences at shuffled places of a table with room between them, filled with codes that nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    capacity = max(lengths) + 3
    lanes = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
    num_tokens = (len(lengths) + 2) * capacity
    keys = torch.randn(num_tokens, kv_heads, head_dim, generator=generator) * scale + offset
    sketched = make_sketch(keys, bits, parts)
    query = torch.randn(len(lengths), kv_heads * group, head_dim, generator=generator) * scale
    starts = lanes * capacity
    inside = torch.zeros(num_tokens, dtype=torch.bool)
    for start, length in zip(starts.tolist(), lengths, strict=True):
        inside[start : start + length] = True
    sketched.ranges[~inside] = torch.nan
    counts = torch.tensor(lengths, dtype=torch.int32)
    num_sets = kv_heads if per_head else 1
    return Problem(query.to(dtype), sketched, starts, counts, max(lengths) + seed % 3, num_sets, softcap)


@st.composite
def problems(draw, scales=(1.0,), most=4):
    """Problems of up to `most` sequences, and one KV head more."""
    ends = st.sampled_from([1, 32, 33, 64]) | st.integers(1, 200)
    parts = draw(st.sampled_from([1, 1, 2, 3, 4]))
    return make_problem(
        draw(st.sampled_from([2, 4, 8])),
        lengths=draw(st.lists(ends, min_size=1, max_size=most)),
        kv_heads=draw(st.integers(1, most + 1)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        head_dim=draw(st.sampled_from([1, 2, 5, 7, 16, 31, 64, 80, 128, 136] if parts == 1 else [1, 7, 16, 64]))
        * parts,
        parts=parts,
        softcap=draw(st.sampled_from([None, None, 5.0])),
        per_head=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from(scales)),
        offset=draw(st.sampled_from([0.0, -3.0])),
        seed=draw(st.integers(0, 10**6)),
    )


def assert_agrees(weights, problem):
    """Weights are the float64 answer, up to a query rounded to 1/32639 of its largest value and float32 sums."""
    num_seqs, num_heads, head_dim = problem.query.shape
    num_kv_heads = problem.keys.num_kv_heads
    query = problem.query.double()
    assert weights.shape == (num_seqs, problem.num_sets, problem.width)
    for seq, (start, length) in enumerate(zip(problem.starts.tolist(), problem.lengths.tolist(), strict=True)):
        keys = unsketch(sketch_rows(problem.keys, torch.arange(start, start + length)), head_dim).double()
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)  # [S, H, D]
        scores = torch.einsum("hd,shd->hs", query[seq], keys) * head_dim**-0.5
        if problem.softcap is not None:  # a cap brings scores closer to each other, and their errors
            scores = problem.softcap * (scores / problem.softcap).tanh()
        expected = scores.softmax(-1)
        rounded = query[seq].abs().amax(-1) / 32639 / 2 * keys.abs().sum(-1).amax(0)
        # Step * (q . codes) and minimum * sum(q) cancel: both are bounded by twice the largest |key| times sum |q|.
        summed = 3 * keys.abs().amax((0, 2)) * query[seq].abs().sum(-1) * 4 * EPS
        slack = float(((rounded + summed) * head_dim**-0.5).max())
        expected = expected.view(problem.num_sets, -1, length).sum(1)
        tolerance = min(2.0 * slack, 50.0)
        rtol = torch.tensor(tolerance).expm1().item() * 2 + (length + 20) * EPS
        torch.testing.assert_close(weights[seq, :, :length].double(), expected, rtol=rtol, atol=num_heads * 1e-30)
        assert (weights[seq, :, length:] == 0).all()


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(1e-3, 1.0, 5.0)))
def test_any_shape_is_the_definition(isa, problem):
    assert_agrees(kernels(isa).sketch_scores(*problem.args()), problem)


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(scales=(0.0, 1e-30, 1e4)))
def test_extreme_values_stay_finite(isa, problem):
    problem.keys.ranges[problem.keys.ranges.isnan()] = 0  # a reference gathers them, a kernel does not
    weights = kernels(isa).sketch_scores(*problem.args())
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    heads = torch.full((len(weights),), float(problem.query.shape[1]), dtype=torch.float64)
    # Weights are parts of a sum of as many numbers as there are tokens, each addition rounded, in any order.
    rtol = 2.0**-24 * (int(problem.lengths.max()) + 2)
    torch.testing.assert_close(weights.double().sum(dim=(1, 2)), heads, rtol=rtol, atol=0)


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_head", [False, True])
def test_it_does_what_the_torch_twin_does(isa, bits, per_head):
    problem = make_problem(bits, lengths=[300, 41, 512], kv_heads=4, group=3, per_head=per_head)
    fast, slow = kernels(isa).sketch_scores(*problem.args()), sketch_scores(*problem.args())
    torch.testing.assert_close(fast, slow, rtol=2e-3, atol=1e-7)
    for seq, length in enumerate(problem.lengths.tolist()):
        for ours, theirs in zip(fast[seq, :, :length], slow[seq, :, :length], strict=True):
            chosen = [set(weights.topk(length // 5).indices.tolist()) for weights in (ours, theirs)]
            assert len(chosen[0] - chosen[1]) <= 1  # two that are as good as equal


def budgets_of(problem, data):
    """(older_ends, older_counts, counts) Int32[B * J] and K: any number of tokens of each sequence, with its last."""
    ends, older, counts = [], [], []
    for length in problem.lengths.tolist():
        ends.append(data.draw(st.integers(0, length - 1)))
        older.append(data.draw(st.integers(0, ends[-1])))
        counts.append(older[-1] + length - ends[-1])
    columns = [torch.tensor(c, dtype=torch.int32).repeat_interleave(problem.num_sets) for c in (ends, older, counts)]
    return *columns, max(counts) + data.draw(st.integers(0, 2))


def assert_chosen(found, problem, scores, budgets):
    """What a stable sort of the scores chooses, and the share of every head's weight by the torch reference."""
    older_ends, older_counts, counts, num_slots = budgets
    positions, shares = found.positions, found.shares
    assert torch.equal(found.counts, counts)
    num_seqs, num_heads, _ = problem.query.shape
    rows = zip(older_ends.tolist(), older_counts.tolist(), counts.tolist(), strict=True)
    flat = scores.flatten(0, 1).double()
    expected = [by_sorting(flat, row, *budget, num_slots) for row, budget in enumerate(rows)]
    assert positions.tolist() == expected
    problem.keys.ranges[problem.keys.ranges.isnan()] = 0  # the reference gathers them
    weights = sketch_weights(*problem.args()[:-2], problem.softcap)
    assert shares.shape == (num_seqs, num_heads)
    for seq, length in enumerate(problem.lengths.tolist()):
        for head, share in enumerate(shares[seq].tolist()):
            row = seq * problem.num_sets + head * problem.num_sets // num_heads
            chosen = expected[row][: counts[row]]
            if len(chosen) == length:
                assert share == 1.0
            assert share == pytest.approx(float(weights[seq, head, chosen].sum()), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(), data=st.data())
def test_what_is_chosen_and_its_shares(isa, problem, data):
    budgets = budgets_of(problem, data)
    query, keys, starts, lengths = problem.args()[:4]
    ranking = Ranking(starts, lengths, *budgets, problem.width, problem.num_sets, problem.softcap)
    scores = kernels(isa).sketch_scores(*problem.args())
    assert_chosen(kernels(isa).sketch_select(query, keys, ranking), problem, scores, budgets)


def fewest_that_cover(scores, row, budgets, target):
    """Older tokens of one index set, by adding up whole numbers from the largest down."""
    older_ends, older_counts, counts, _ = budgets
    end, most = int(older_ends[row]), int(older_counts[row])
    units = [int(score * 2.0**32) for score in scores.flatten(0, 1)[row].double().tolist()]
    missing = target - sum(units[end : end + int(counts[row]) - most])
    count = 0
    for unit in sorted(units[:end], reverse=True)[:most]:
        if missing <= 0:
            break
        missing, count = missing - unit, count + 1
    return count


@pytest.mark.parametrize("isa", [*SKETCH_ISAS, "torch"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    problem=problems(),
    coverages=st.lists(st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.999, 1.0]), min_size=9),
    data=st.data(),
)
def test_as_few_are_chosen_as_have_that_part_of_the_weight(isa, problem, coverages, data):
    budgets = budgets_of(problem, data)
    query, keys, starts, lengths = problem.args()[:4]
    own = torch.tensor([coverages[seq % 9] for seq in range(len(query))], dtype=torch.float64)
    ranking = Ranking(starts, lengths, *budgets, problem.width, problem.num_sets, problem.softcap, own)
    if isa == "torch":
        keys.ranges[keys.ranges.isnan()] = 0  # the reference gathers them
        scores = sketch_weights(*problem.args()[:-2], problem.softcap)
        scores = scores.unflatten(1, (problem.num_sets, -1)).sum(dim=2)
        found = ReferenceSelection().sketch_select(query, keys, ranking)
    else:
        scores = kernels(isa).sketch_scores(*problem.args())
        found = kernels(isa).sketch_select(query, keys, ranking)
    older_ends, older_counts, counts, num_slots = budgets
    of_rows = own.repeat_interleave(problem.num_sets).tolist()
    targets = [int(coverage * (query.shape[1] // problem.num_sets) * 2.0**32) for coverage in of_rows]
    wanted = [
        fewest_that_cover(scores, row, budgets, target) if target else int(older_counts[row])
        for row, target in enumerate(targets)
    ]
    of_sequences = torch.tensor(wanted).view(-1, problem.num_sets).amax(dim=1).repeat_interleave(problem.num_sets)
    older = of_sequences.to(torch.int32)
    fewer = (older_ends, older, counts - older_counts + older, num_slots)
    assert_chosen(found, problem, scores, fewer)


@st.composite
def valued_problems(draw, most=4):
    """A problem, and values of all rows of its table; those that nobody may read are not numbers."""
    problem = draw(problems(most=most))
    num_tokens, num_kv_heads, parts = len(problem.keys.codes), problem.keys.num_kv_heads, problem.keys.parts
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.randn(num_tokens, num_kv_heads, problem.query.shape[2], generator=generator) + 1.0
    sketched = make_sketch(values, draw(st.sampled_from([2, 4, 8])), parts)
    sketched.ranges[problem.keys.ranges.isnan()] = torch.nan
    return problem, sketched


def assert_completed(found, problem, values, budgets):
    """The rest is what the sketched values of the tokens that are not chosen add up to at float64 weights."""
    _, num_heads, head_dim = problem.query.shape
    (positions, shares, _), rest = found
    counts = budgets[2].tolist()
    for table in (problem.keys.ranges, values.ranges):
        table[table.isnan()] = 0
    weights = sketch_weights(*problem.args()[:-2], problem.softcap).double()
    for seq, (start, length) in enumerate(zip(problem.starts.tolist(), problem.lengths.tolist(), strict=True)):
        rows = unsketch(sketch_rows(values, torch.arange(start, start + length)), head_dim).double()
        for head in range(num_heads):
            row = seq * problem.num_sets + head * problem.num_sets // num_heads
            left = weights[seq, head, :length].clone()
            left[positions[row, : counts[row]].long()] = 0
            expected = left @ rows[:, head * rows.shape[1] // num_heads]
            torch.testing.assert_close(rest[seq, head].double(), expected, rtol=2e-3, atol=2e-3)
            if counts[row] == length:
                assert (rest[seq, head] == 0).all()
                assert shares[seq, head] == 1


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(valued=valued_problems(), data=st.data())
def test_what_is_not_read_is_added_up_from_the_sketched_values(isa, valued, data):
    problem, values = valued
    budgets = budgets_of(problem, data)
    query, keys, starts, lengths = problem.args()[:4]
    ranking = Ranking(starts, lengths, *budgets, problem.width, problem.num_sets, problem.softcap)
    found = kernels(isa).sketch_complete(query, keys, values, ranking)
    chosen = kernels(isa).sketch_select(query, keys, ranking)
    assert all(torch.equal(one, other) for one, other in zip(found.chosen, chosen, strict=True))
    assert_completed(found, problem, values, budgets)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(valued=valued_problems(), data=st.data())
def test_the_reference_adds_up_the_same(valued, data):
    problem, values = valued
    budgets = budgets_of(problem, data)
    for table in (problem.keys.ranges, values.ranges):
        table[table.isnan()] = 0
    query, keys, starts, lengths = problem.args()[:4]
    ranking = Ranking(starts, lengths, *budgets, problem.width, problem.num_sets, problem.softcap)
    assert_completed(ReferenceSelection().sketch_complete(query, keys, values, ranking), problem, values, budgets)


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 17, 64])
def test_blending_is_the_twins_and_leaves_what_was_read_in_full(isa, dtype, head_dim):
    generator = torch.Generator().manual_seed(head_dim)
    out = torch.randn(3, 5, head_dim, generator=generator).to(dtype)
    shares, rest = torch.rand(3, 5, generator=generator), torch.randn(3, 5, head_dim, generator=generator)
    shares[1, 2:], rest[1, 2:] = 1.0, 0.0
    blended = kernels(isa).rest_blend(out, shares, rest)
    assert blended.dtype == dtype
    twins = ReferenceSelection().rest_blend(out, shares, rest)
    torch.testing.assert_close(blended, twins, rtol=torch.finfo(dtype).eps, atol=1e-6)
    for mine in (blended, twins):
        assert torch.equal(mine[1, 2:], out[1, 2:])


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@pytest.mark.parametrize("group", [1, 4])
def test_parts_of_a_head_with_ranges_of_their_own_are_closer_to_the_keys(isa, group):
    """As in Gemma 3: heads of 256 whose parts differ in size by far."""
    sizes = torch.tensor([10.0, 1.0, 0.1, 1.0]).repeat_interleave(64)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 1, 256, generator=generator) * sizes
    query = torch.randn(1, group, 256, generator=generator) / sizes
    starts, lengths = torch.tensor([0]), torch.tensor([200], dtype=torch.int32)
    exact = ((query[0] @ keys[:, 0].T) / 16).softmax(-1).sum(0)
    errors = []
    for parts in (1, 4):
        found = kernels(isa).sketch_scores(query, make_sketch(keys, 4, parts), starts, lengths, 200, 1)
        errors.append(float((found[0, 0] - exact).abs().max()))
    assert errors[1] < errors[0] / 4


def test_the_comparison_notices_a_token_too_few():
    problem = make_problem(4, lengths=[60, 30])
    weights = cpu.CpuKernels().sketch_scores(*problem.args())
    problem.lengths -= 1
    with pytest.raises(AssertionError):
        assert_agrees(weights, problem)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("share_threads", [True, False])
def test_one_long_sequence_is_split_and_merged(num_threads, share_threads):
    problem = make_problem(4, lengths=[5000], group=1)
    assert_agrees(
        cpu.CpuKernels(num_threads=num_threads, share_threads=share_threads).sketch_scores(*problem.args()), problem
    )


def test_calls_after_another_shape_reuse_the_workspace():
    kernel = cpu.CpuKernels()
    for length, bits, group in ((300, 8, 1), (10, 2, 5), (700, 4, 8)):
        problem = make_problem(bits, lengths=[length], head_dim=37, group=group)
        assert_agrees(kernel.sketch_scores(*problem.args()), problem)


@pytest.mark.parametrize("isa", SKETCH_ISAS)
@settings(max_examples=25)
@given(
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.sampled_from([1, 9, 200]),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 3, 5, 16, 31, 64, 80, 128]),
    parts=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 1.0, 300.0, 6e4]),
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_append_writes_the_twins_codes(isa, bits, dtype, num_tokens, kv_heads, head_dim, parts, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_tokens, kv_heads, head_dim * parts, generator=generator).clamp(-1, 1) * scale + offset
    keys = (keys.clamp(-65504, 65504) if dtype == torch.float16 else keys * 3).to(
        dtype
    )  # beyond float16 where it can be
    ids = torch.randperm(2 * num_tokens, generator=generator)[:num_tokens]
    tables = []
    for append in (kernels(isa).sketch_append, ReferenceSelection().sketch_append):
        heads = (2 * num_tokens, kv_heads * parts)
        codes = torch.full((*heads, -(-head_dim * bits // 8)), 7, dtype=torch.uint8)
        tables.append(Sketch(codes, torch.full((*heads, 2), 7, dtype=torch.float16), bits, parts))
        append(tables[-1], ids, keys)
    ours, theirs = tables
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.ranges, theirs.ranges)


def test_append_takes_keys_that_are_parts_of_a_wider_tensor():
    fused = torch.randn(5, 1, 6, 16)
    keys = fused[:, 0, 2:4]
    codes, ranges = torch.zeros(5, 2, 8, dtype=torch.uint8), torch.zeros(5, 2, 2, dtype=torch.float16)
    cpu.CpuKernels().sketch_append(Sketch(codes, ranges, 4), torch.arange(5), keys)
    expected = make_sketch(keys, 4)
    assert torch.equal(codes, expected.codes)
    assert torch.equal(ranges, expected.ranges)


def test_arguments_that_do_not_fit_are_refused():
    kernel = cpu.CpuKernels()
    query, keys, starts, lengths, width, num_sets, _ = make_problem(4, lengths=[20, 30]).args()
    with pytest.raises(ValueError, match="2, 4 or 8"):
        kernel.sketch_scores(query, keys._replace(bits=3), starts, lengths, width, num_sets)
    with pytest.raises(ValueError, match="as 8 bits"):
        kernel.sketch_scores(query, keys._replace(bits=8), starts, lengths, width, num_sets)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.sketch_scores(query[:, :3], keys, starts, lengths, width, num_sets)
    with pytest.raises(TypeError, match="int64"):
        kernel.sketch_scores(query, keys, starts.int(), lengths, width, num_sets)
    with pytest.raises(TypeError, match="float16"):
        kernel.sketch_scores(query, keys._replace(ranges=keys.ranges.float()), starts, lengths, width, num_sets)
    with pytest.raises(ValueError, match="contiguous"):
        kernel.sketch_append(Sketch(keys.codes[::2], keys.ranges[::2], 4), torch.arange(1), torch.randn(1, 2, 64))
    budget = torch.ones(2, dtype=torch.int32)
    ranking = Ranking(starts, lengths, budget, budget, budget, 5, width, num_sets)
    with pytest.raises(ValueError, match="as many contiguous budgets"):
        kernel.sketch_select(query, keys, ranking._replace(counts=budget[:1]))
    with pytest.raises(TypeError, match="budgets are int32"):
        kernel.sketch_select(query, keys, ranking._replace(counts=budget.long()))
    with pytest.raises(ValueError, match="as many ids"):
        kernel.sketch_append(keys, torch.arange(2), torch.randn(1, 2, 64))
    with pytest.raises(ValueError, match="values are in 2 parts and those of the keys in 1"):
        kernel.sketch_complete(query, keys, make_sketch(torch.randn(len(keys.codes), 2, 64), 2, 2), ranking)
    fewer = Sketch(keys.codes[:-1], keys.ranges[:-1], 4)
    with pytest.raises(ValueError, match="not those of"):
        kernel.sketch_complete(query, keys, fewer, ranking)
    out = torch.zeros(2, 4, 64)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.rest_blend(out, out[:, :3, 0], out)
    with pytest.raises(TypeError, match="float32"):
        kernel.rest_blend(out, out[..., 0].double(), out)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(), data=st.data())
def test_the_reference_chooses_by_its_scores(problem, data):
    budgets = budgets_of(problem, data)
    query, keys, starts, lengths = problem.args()[:4]
    ranking = Ranking(starts, lengths, *budgets, problem.width, problem.num_sets, problem.softcap)
    scores = sketch_scores(*problem.args())
    assert_chosen(ReferenceSelection().sketch_select(query, keys, ranking), problem, scores, budgets)
