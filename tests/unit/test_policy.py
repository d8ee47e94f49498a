"""Selection policies without a model: budgets, and the local sum against a plain re-computation."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.budget import Budget
from alisa.config import PolicyName
from alisa.kernels.base import Attended, StepBatch
from alisa.kernels.native import kernels as cpu
from alisa.policy.dense import Dense
from alisa.policy.h2o import HeavyHitters
from alisa.policy.pattern import Pattern
from alisa.policy.registry import make_policy
from alisa.policy.sketch import KeySketch, sketch, unsketch
from alisa.policy.swa import SparseWindow
from tests.specs import small_spec

CPU = torch.device("cpu")


@given(num_earlier=st.integers(0, 5000))
def test_sparsity_zero_reads_everything(num_earlier):
    assert sum(Budget(0.0).split(num_earlier)) == num_earlier


@given(num_earlier=st.integers(1, 5000), percent=st.integers(0, 99))
def test_budget_is_the_rounded_ratio(num_earlier, percent):
    budget = Budget(percent / 100, dense_until=0)
    recent, older = budget.split(num_earlier)
    # n * (100 - percent) / 200, ties up, in integers
    k = max(1, (num_earlier * (100 - percent) + 100) // 200)
    assert recent == min(k, num_earlier)
    assert older == min(recent, num_earlier - recent)
    assert budget.recent(num_earlier + 1) - budget.recent(num_earlier) in (0, 1)


def test_budget_takes_the_sparsity_as_written():
    # 0.8 is stored as 0.8000000000000000444; 5 * (1 - 0.8) / 2 is a tie that must round up all the same
    assert Budget(0.8, dense_until=0).recent(5 * 5) == 3


def make_batch(lengths, req_indices=None):
    req_indices = tuple(req_indices or range(len(lengths)))
    return StepBatch(
        req_indices, tuple(lengths), torch.tensor(req_indices), torch.tensor(list(lengths), dtype=torch.int32)
    )


def test_dense_selects_every_position_of_a_ragged_batch():
    state = Dense().start(small_spec(), 3, 8, CPU)
    state.begin(make_batch([3, 5], req_indices=[2, 0]))
    selection = state.select(0, torch.empty(0))
    assert selection.positions.tolist() == [[[0, 1, 2, 0, 0]], [[0, 1, 2, 3, 4]]]
    assert selection.counts.tolist() == [3, 5]
    assert selection.num_tokens == (3, 5)


def selection_kernels(native):
    if native and not cpu.available():
        pytest.skip(cpu.unavailable_reason())
    return cpu.CpuKernels() if native else None


class Plain:
    """The definition of a scored policy for one sequence, layer and index set, with every row kept and summed anew."""

    def __init__(self, kind, budget):
        self.kind = kind
        self.budget = budget
        self.rows = {}

    def scores(self, num_earlier):
        """What each earlier position is ranked by: rows of the window for swa, all rows for h2o."""
        first = 0 if self.kind == "h2o" else num_earlier - self.budget.recent(num_earlier)
        rows = [row for i, row in self.rows.items() if i >= first]
        return [sum(row.get(j, 0.0) for row in rows) for j in range(num_earlier)]

    def check(self, chosen, num_earlier):
        """The whole window, the right number of others, and none of those left out has a higher score."""
        recent, older = self.budget.split(num_earlier)
        window = list(range(num_earlier - recent, num_earlier + 1))
        assert chosen == sorted(set(chosen))
        assert chosen[older:] == window
        scores = self.scores(num_earlier)
        left_out = set(range(num_earlier - recent)) - set(chosen)
        if left_out and older:
            assert min(scores[j] for j in chosen[:older]) >= max(scores[j] for j in left_out) - 1e-9

    def observe(self, chosen, num_earlier, mass):
        if self.kind == "h2o":  # eviction: what was not read has lost all it had
            self.rows = {i: {j: w for j, w in row.items() if j in chosen} for i, row in self.rows.items()}
        self.rows[num_earlier] = dict(zip(chosen, mass, strict=True))


@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("native", [False, True])
@given(data=st.data(), kind=st.sampled_from(["swa", "swa-head", "h2o"]))
def test_scored_policies_select_what_their_definition_says(native, data, kind):
    """Ragged req_indices that join at different times, random mass, bucket of one row: equal to the definition at every
    step."""
    sparsity = data.draw(st.sampled_from([0.3, 0.5, 0.8, 0.9]))
    prompts = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    budget = Budget(sparsity, dense_until=data.draw(st.integers(0, 20)))
    policy = HeavyHitters(budget) if kind == "h2o" else SparseWindow(budget, per_head=kind == "swa-head")
    num_steps, capacity, num_sets = 25, 100, policy.num_sets(small_spec())
    kernels = selection_kernels(native)
    state = policy.start(small_spec(), 5, capacity, CPU, kernels)
    req_indices = list(range(len(prompts)))[::-1]
    plain = [[Plain(kind, budget) for _ in range(num_sets)] for _ in prompts]
    for req_idx, prompt, references in zip(req_indices, prompts, plain, strict=True):
        state.open(req_idx, capacity)
        num_rows = policy.seed_rows(prompt)
        rows = torch.rand(num_rows, num_sets, prompt, generator=generator)
        # two blocks, as a long prompt would give them
        half = num_rows // 2
        for first, block in ((prompt - num_rows, rows[:half]), (prompt - num_rows + half, rows[half:])):
            if len(block):
                state.seed(1, req_idx, first, 0, block)
        for i, row in enumerate(rows):
            for reference, weights in zip(references, row.tolist(), strict=True):
                reference.rows[prompt - num_rows + i] = dict(enumerate(weights))
    for step in range(num_steps):
        joined = [i for i in range(len(prompts)) if step >= 3 * i]
        lengths = [prompts[i] + step - 3 * i + 1 for i in joined]
        state.begin(make_batch(lengths, [req_indices[i] for i in joined]))
        selection = state.select(1, torch.empty(0))
        assert selection.counts.tolist() == list(selection.num_tokens)
        mass = torch.rand(selection.positions.shape, generator=generator)
        for row, (i, length) in enumerate(zip(joined, lengths, strict=True)):
            count = selection.num_tokens[row]
            mass[row, :, count:] = 0
            for j, reference in enumerate(plain[i]):
                chosen = selection.positions[row, j, :count].tolist()
                reference.check(chosen, length - 1)
                reference.observe(chosen, length - 1, mass[row, j, :count].tolist())
        state.observe(1, selection, mass)


@given(
    num_earlier=st.integers(0, 3000),
    percent=st.integers(0, 99),
    name=st.sampled_from(["local", "strided", "streaming"]),
)
def test_patterns_read_as_many_tokens_as_swa(num_earlier, percent, name):
    pattern = Pattern(name, Budget(percent / 100))
    positions = pattern.earlier(num_earlier)
    assert len(positions) == sum(pattern.budget.split(num_earlier))
    assert positions == sorted(set(positions))
    assert not positions or 0 <= positions[0] <= positions[-1] < num_earlier


def test_patterns_look_as_published():
    budget = Budget(0.6, dense_until=0)  # 20 earlier tokens: 4 recent and 4 older
    assert Pattern("local", budget).earlier(20) == list(range(12, 20))
    assert Pattern("strided", budget).earlier(20) == [3, 7, 11, 15, 16, 17, 18, 19]
    assert Pattern("streaming", budget).earlier(20) == [0, 1, 2, 3, 16, 17, 18, 19]


def test_patterns_pad_a_ragged_batch():
    state = Pattern("local", Budget(0.5, dense_until=0)).start(small_spec(), 2, 20, CPU)
    state.begin(make_batch([5, 9]))
    selection = state.select(0, torch.empty(0))
    assert selection.positions.tolist() == [[[2, 3, 4, 0, 0]], [[4, 5, 6, 7, 8]]]
    assert selection.counts.tolist() == [3, 5]


def test_swa_forgets_the_former_owner_of_a_req_idx():
    policy = SparseWindow(Budget(0.5, dense_until=0))
    used, fresh = (policy.start(small_spec(), 1, 64, CPU) for _ in range(2))
    used.open(0, 64)
    used.seed(0, 0, 20, 0, torch.rand(20, 1, 40))
    for state in (used, fresh):
        state.open(0, 64)
        state.seed(0, 0, 8, 0, torch.rand(4, 1, 12, generator=torch.Generator().manual_seed(1)))
        state.begin(make_batch([13]))
    expected, actual = (state.select(0, torch.empty(0)).positions for state in (fresh, used))
    assert torch.equal(expected, actual)


def test_swa_state_shrinks_when_rows_share_buckets():
    exact, coarse = (SparseWindow(Budget(0.8), max_buckets=n).start(small_spec(), 2, 4000, CPU) for n in (1000, 16))
    assert coarse.nbytes < exact.nbytes / 15


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_name_users_can_type_has_a_policy(name):
    assert make_policy(name, 0.5).name == name


@pytest.mark.parametrize("max_buckets", [4, 7])
def test_buckets_keep_at_least_the_window(max_buckets):
    """With w rows to a bucket the sum covers the last k rows and at most w - 1 more."""
    budget = Budget(0.5, dense_until=0)
    state = SparseWindow(budget, max_buckets=max_buckets).start(small_spec(), 1, 200, CPU)
    state.open(0, 200)
    bucket_rows = -(-budget.recent(200) // max_buckets)
    prompt = 30
    num_rows = budget.recent(prompt)
    # every row puts its whole mass on position 0, so the sum there counts the rows
    rows = torch.zeros(num_rows, 1, prompt)
    rows[:, :, 0] = 1
    state.seed(0, 0, prompt - num_rows, 0, rows)
    for length in range(prompt + 1, 190):
        state.begin(make_batch([length]))
        window = budget.recent(length - 1)
        assert window <= float(state._sums[0, 0, 0]) <= window + bucket_rows - 1
        selection = state.select(0, torch.empty(0))
        mass = torch.zeros(selection.positions.shape)
        assert selection.positions[0, 0, 0] == 0
        mass[0, 0, 0] = 1
        state.observe(0, selection, mass)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [1, 7, 16])
def test_sketched_keys_are_within_half_a_step(bits, head_dim):
    keys = torch.randn(50, 3, head_dim, generator=torch.Generator().manual_seed(head_dim)) * 5
    keys[0] = 2.5  # no range at all
    codes, ranges = sketch(keys, bits)
    assert codes.shape == (50, 3, -(-head_dim * bits // 8))
    error = (unsketch(codes, ranges, bits, head_dim) - keys).abs()
    step, minimum = ranges.float().split(1, dim=-1)
    # Both are rounded to 11 bits: the minimum moves, and so does the value that the last code stands for.
    rounding = (minimum.abs() + (2**bits - 1) * step) * 2**-11 + 2**-24
    assert (error <= step / 2 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_lie_in_planes_lowest_bits_first(bits):
    num_planes, head_dim = 8 // bits, 8 * (8 // bits) - 1
    keys = torch.arange(head_dim).remainder(2**bits)[None, None].float()
    keys[..., -1] = 2**bits - 1  # minimum 0, step 1: a key is its code
    codes, ranges = sketch(keys, bits)
    assert ranges.tolist() == [[[1.0, 0.0]]]
    for i, byte in enumerate(codes[0, 0].tolist()):
        expected = [keys[0, 0, j].item() if j < head_dim else 0 for j in range(i, 8 * num_planes, 8)]
        assert [byte >> shift & (2**bits - 1) for shift in range(0, 8, bits)] == expected


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_oracle_reads_the_tokens_with_the_largest_true_weight(native, per_head):
    """A token that no recent query looked at comes back when the query asks for it; a sketch nearly agrees."""
    spec, budget = small_spec(), Budget(0.8, dense_until=0)
    generator = torch.Generator().manual_seed(5)
    lengths, capacity = [40, 25], 50
    keys = torch.randn(2, capacity, spec.num_kv_heads, spec.head_dim, generator=generator)
    query = torch.randn(2, spec.num_heads, spec.head_dim, generator=generator) * 3
    kernels = selection_kernels(native)
    states = [KeySketch(budget, bits, per_head).start(spec, 2, capacity, CPU, kernels) for bits in (None, 8, 4, 2)]
    for state in states:
        for req_idx, length in enumerate(lengths):
            state.remember(
                1, torch.full((length,), req_idx), torch.arange(length), keys[req_idx, :length], keys[req_idx, :length]
            )
        state.begin(make_batch(lengths))
    exact, *sketched = (state.select(1, query) for state in states)
    num_sets = spec.num_kv_heads if per_head else 1
    for req_idx, length in enumerate(lengths):
        repeated = keys[req_idx, :length].repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)
        weights = (torch.einsum("hd,shd->hs", query[req_idx], repeated) / spec.head_dim**0.5).softmax(-1)
        recent, older = budget.split(length - 1)
        for j, of_set in enumerate(weights.view(num_sets, -1, length).sum(1)):
            best = of_set[: length - 1 - recent].topk(older).indices.tolist()
            expected = sorted([*best, *range(length - 1 - recent, length)])
            assert exact.positions[req_idx, j, : exact.num_tokens[req_idx]].tolist() == expected
            for selection, least in zip(sketched, (0.97, 0.9, 0.7), strict=True):
                chosen = selection.positions[req_idx, j, : selection.num_tokens[req_idx]].tolist()
                assert of_set[chosen].sum() > least * of_set[expected].sum()
    sizes = [state.nbytes for state in states]
    assert sizes == sorted(sizes, reverse=True)


def test_a_sketch_is_small_against_the_rows_it_stands_for():
    spec = small_spec(head_dim=64)
    state = KeySketch(Budget(0.8)).start(spec, 3, 100, CPU)
    means = spec.num_layers * 3 * spec.num_kv_heads * 64 * 8
    assert state.nbytes == spec.num_layers * 3 * 100 * spec.num_kv_heads * (64 // 2 + 4) + means


def plain_attention(query, keys, values, chosen=None):
    """(output `[H, D]`, weights `[H, S]`) of one sequence over the chosen tokens of each head, `chosen[h]`, or all."""
    group = len(query) // keys.shape[1]
    keys, values = (table.double().repeat_interleave(group, dim=1) for table in (keys, values))
    scores = torch.einsum("hd,shd->hs", query.double(), keys) / query.shape[-1] ** 0.5
    if chosen is not None:
        read = torch.zeros_like(scores, dtype=torch.bool)
        for head, positions in enumerate(chosen):
            read[head, positions] = True
        scores = scores.masked_fill(~read, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values), weights


@pytest.mark.parametrize("native", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_mean_takes_the_weight_that_is_not_read(native, data):
    """Ragged req_indices that held others before, prompts in pieces: out = a out(read) + (1 - a) mean(V), a for each
    head."""
    num_kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    spec = small_spec(num_kv_heads=num_kv_heads, num_heads=num_kv_heads * data.draw(st.sampled_from([1, 2, 4])))
    bits, per_head = data.draw(st.sampled_from([None, 8])), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    capacity, budget = 70, Budget(0.8, dense_until=0)
    state = KeySketch(budget, bits, per_head).start(spec, 4, capacity, CPU, selection_kernels(native))
    keys, values = torch.randn(2, 3, capacity, spec.num_kv_heads, spec.head_dim, generator=generator).unbind()
    query = torch.randn(len(lengths), spec.num_heads, spec.head_dim, generator=generator)
    req_indices = [3, 0, 2][: len(lengths)]
    for req_idx, length in zip(req_indices, lengths, strict=True):
        state.open(req_idx, capacity)
        former = torch.randn(9, spec.num_kv_heads, spec.head_dim, generator=generator)
        state.remember(1, torch.full((9,), req_idx), torch.arange(9), former, former)
        state.open(req_idx, capacity)
        cut = data.draw(st.integers(0, length - 1))
        for piece in (range(cut), range(cut, length)):
            rows = slice(piece.start, piece.stop)
            owner, places = torch.full((len(piece),), req_idx), torch.tensor(list(piece), dtype=torch.int64)
            state.remember(
                1, owner, places, keys[req_indices.index(req_idx), rows], values[req_indices.index(req_idx), rows]
            )
    state.begin(make_batch(lengths, req_indices))
    selection = state.select(1, query)
    out = torch.randn(query.shape, generator=generator)
    completed = state.complete(1, Attended(out, torch.empty(0), torch.empty(0)))
    for row, length in enumerate(lengths):
        of_sets = selection.positions[row, :, : selection.num_tokens[row]].tolist()
        _, weights = plain_attention(query[row], keys[row, :length], values[row, :length])
        for head in range(spec.num_heads):
            chosen = of_sets[head * len(of_sets) // spec.num_heads]
            share = float(weights[head, chosen].sum())
            mean = values[row, :length, head * num_kv_heads // spec.num_heads].mean(dim=0)
            expected = share * out[row, head] + (1 - share) * mean
            # 8 bits move a score by a hundredth at the most, and a share by that times itself and what it lacks of 1.
            slack = 1e-5 if bits is None else 0.05 * share * (1 - share) * 8 + 1e-5
            torch.testing.assert_close(completed[row, head], expected, rtol=0, atol=slack)


def test_reading_everything_leaves_attention_as_it_is():
    spec = small_spec()
    state = KeySketch(Budget(0.0)).start(spec, 1, 40, CPU, selection_kernels(cpu.available()))
    state.open(0, 40)
    keys = torch.randn(30, spec.num_kv_heads, spec.head_dim)
    state.remember(0, torch.zeros(30, dtype=torch.int64), torch.arange(30), keys, keys)
    state.begin(make_batch([30]))
    query = torch.randn(1, spec.num_heads, spec.head_dim)
    state.select(0, query)
    assert torch.equal(state.complete(0, Attended(query, torch.empty(0), torch.empty(0))), query)


def test_the_mean_brings_thinly_spread_attention_closer():
    """Weights that differ little: a fifth of the tokens says less than it and the mean of all."""
    spec = small_spec()
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 50, spec.num_kv_heads, spec.head_dim, generator=generator).unbind()
    query = torch.randn(1, spec.num_heads, spec.head_dim, generator=generator) * 0.5
    req_indices = torch.zeros(50, dtype=torch.int64)
    errors = []
    for completes in (True, False):
        state = KeySketch(Budget(0.8, dense_until=0), completes=completes).start(spec, 1, 50, CPU)
        state.open(0, 50)
        state.remember(0, req_indices, torch.arange(50), keys, values)
        state.begin(make_batch([50]))
        chosen = state.select(0, query).positions[0, 0].tolist()
        out, _ = plain_attention(query[0], keys, values, [chosen] * spec.num_heads)
        completed = state.complete(0, Attended(out.float()[None], torch.empty(0), torch.empty(0)))
        dense, _ = plain_attention(query[0], keys, values)
        errors.append(float((completed[0] - dense).norm()))
    assert errors[0] < errors[1] / 2
