"""Selection policies without a model: budgets, and the local sum against a plain re-computation."""

import mmap
import sys
from dataclasses import replace
from itertools import pairwise
from math import ceil, log2
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.budget import Budget, state_tokens
from alisa.config import PolicyName
from alisa.kernels.base import Attended, StepBatch
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.kernels.reference.sketch import make_sketch, unsketch
from alisa.policy import state_bytes
from alisa.policy.dense import Dense
from alisa.policy.h2o import HeavyHitters
from alisa.policy.pattern import Local, Streaming, Strided
from alisa.policy.registry import POLICIES, make_policy, reads_of
from alisa.policy.sketch import KeySketch
from alisa.policy.state_bytes import num_parts
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


@given(num_earlier=st.integers(0, 5000), percent=st.integers(0, 99))
def test_a_coverage_leaves_the_most_that_is_read(num_earlier, percent):
    most, recent_and_older = (
        sum(Budget(percent / 100).split(num_earlier)),
        Budget(percent / 100, 0.9).split(num_earlier),
    )
    assert sum(recent_and_older) == most
    assert num_earlier <= 16 or recent_and_older[0] == -(-Budget(percent / 100).split(num_earlier)[0] // 4)


def test_budget_takes_the_sparsity_as_written():
    # 0.8 is stored as 0.8000000000000000444; 5 * (1 - 0.8) / 2 is a tie that must round up all the same
    assert Budget(0.8, dense_until=0).recent(5 * 5) == 3


def make_batch(lengths, req_indices=None):
    req_indices = tuple(req_indices or range(len(lengths)))
    return StepBatch(
        req_indices, tuple(lengths), torch.tensor(req_indices), torch.tensor(list(lengths), dtype=torch.int32)
    )


def start(policy, max_num_seqs, max_len, *, spec=None, num_tokens=None, kernels=None):
    """A state with room for so many sequences of the longest length, or for `num_tokens` of them all."""
    return policy.start(
        (spec or small_spec()).attention,
        max_num_seqs=max_num_seqs,
        num_tokens=max_num_seqs * state_tokens(max_len) if num_tokens is None else num_tokens,
        max_len=max_len,
        device=CPU,
        kernels=kernels or ReferenceSelection(),
    )


def fill(state, req_idx, num_tokens):
    """A fresh sequence with room for so many tokens."""
    state.open(req_idx, num_tokens)
    state.reserve(req_idx, num_tokens)


def test_dense_selects_every_position_of_a_ragged_batch():
    state = start(Dense(), 3, 8)
    state.begin(make_batch([3, 5], req_indices=[2, 0]))
    selection = state.select(0, torch.empty(0))
    assert selection.positions.tolist() == [[[0, 1, 2, 0, 0]], [[0, 1, 2, 3, 4]]]
    assert selection.counts.tolist() == [3, 5]
    assert selection.num_tokens == (3, 5)


def selection_kernels(native):
    if native and not library.available():
        pytest.skip(library.unavailable_reason())
    return cpu.CpuKernels() if native else ReferenceSelection()


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
    state = start(policy, 5, capacity, kernels=kernels)
    req_indices = list(range(len(prompts)))[::-1]
    plain = [[Plain(kind, budget) for _ in range(num_sets)] for _ in prompts]
    for req_idx, prompt, references in zip(req_indices, prompts, plain, strict=True):
        fill(state, req_idx, capacity)
        num_rows = policy.observation_window(prompt)
        rows = torch.rand(num_rows, num_sets, prompt, generator=generator)
        # two blocks, as a long prompt would give them
        half = num_rows // 2
        for first, block in ((prompt - num_rows, rows[:half]), (prompt - num_rows + half, rows[half:])):
            if len(block):
                state.observe_prompt(1, req_idx, first, 0, block)
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
        state.on_attended(1, selection, mass)


@given(
    num_earlier=st.integers(0, 3000),
    percent=st.integers(0, 99),
    kind=st.sampled_from([Local, Strided, Streaming]),
)
def test_patterns_read_as_many_tokens_as_swa(num_earlier, percent, kind):
    pattern = kind(Budget(percent / 100))
    positions = pattern.positions(num_earlier)
    assert len(positions) == sum(pattern.budget.split(num_earlier))
    assert positions == sorted(set(positions))
    assert not positions or 0 <= positions[0] <= positions[-1] < num_earlier


def test_patterns_look_as_published():
    budget = Budget(0.6, dense_until=0)  # 20 earlier tokens: 4 recent and 4 older
    assert Local(budget).positions(20) == list(range(12, 20))
    assert Strided(budget).positions(20) == [3, 7, 11, 15, 16, 17, 18, 19]
    assert Streaming(budget).positions(20) == [0, 1, 2, 3, 16, 17, 18, 19]


def test_patterns_pad_a_ragged_batch():
    state = start(Local(Budget(0.5, dense_until=0)), 2, 20)
    state.begin(make_batch([5, 9]))
    selection = state.select(0, torch.empty(0))
    assert selection.positions.tolist() == [[[2, 3, 4, 0, 0]], [[4, 5, 6, 7, 8]]]
    assert selection.counts.tolist() == [3, 5]


def test_swa_forgets_the_former_owner_of_a_req_idx():
    policy = SparseWindow(Budget(0.5, dense_until=0))
    used, fresh = (start(policy, 1, 64) for _ in range(2))
    fill(used, 0, 64)
    used.observe_prompt(0, 0, 20, 0, torch.rand(20, 1, 40))
    for state in (used, fresh):
        fill(state, 0, 64)
        state.observe_prompt(0, 0, 8, 0, torch.rand(4, 1, 12, generator=torch.Generator().manual_seed(1)))
        state.begin(make_batch([13]))
    expected, actual = (state.select(0, torch.empty(0)).positions for state in (fresh, used))
    assert torch.equal(expected, actual)


def test_a_step_that_is_over_is_not_laid_out_anew_for_the_next_owner_of_its_index():
    """A prompt takes the index of one that ended; room for it moves another, and the last step had both indices."""
    state = start(SparseWindow(Budget(0.5)), 3, 128, num_tokens=256)
    for req_idx in (0, 1):
        state.open(req_idx, 64)
        state.reserve(req_idx, 64)
    state.begin(make_batch([40, 40]))
    state.close(1)
    state.open(1, 128)
    state.open(2, 64)
    state.reserve(2, 64)
    state.reserve(1, 128)
    state.begin(make_batch([41, 90]))


def test_swa_state_stops_growing_when_rows_share_buckets():
    sizes = [
        POLICIES["swa"].state_bytes(small_spec().attention, 0.8, length).per_token for length in (200, 640, 100_000)
    ]
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("name", get_args(PolicyName))
def test_a_policy_is_what_its_entry_says(name, sparsity):
    entry, policy = POLICIES[name], make_policy(name, sparsity)
    reads = reads_of(name, sparsity)
    assert entry.query_aware == policy.query_aware
    assert entry.can_truncate == policy.can_truncate
    assert [reads(n) for n in range(200)] == [policy.reads(n) for n in range(200)]
    for prompt_len in range(1, 200):
        assert entry.usable_prefix(sparsity, prompt_len) == prompt_len - policy.observation_window(prompt_len)


def test_a_prompt_may_come_from_a_cache_up_to_what_the_policy_wants_to_see():
    usable = {name: POLICIES[name].usable_prefix(0.8, 1000) for name in ("dense", "streaming", "sketch", "swa", "h2o")}
    assert usable == {"dense": 1000, "streaming": 1000, "sketch": 1000, "swa": 900, "h2o": 0}


@pytest.mark.parametrize("name", get_args(PolicyName))
@pytest.mark.parametrize("head_dim", [24, 160])
def test_state_takes_the_bytes_that_the_entry_says(name, head_dim):
    spec = small_spec(head_dim=head_dim)
    state = start(make_policy(name, 0.5), 4, 700, spec=spec)
    assert state.nbytes == 0
    lengths = {3: 500, 0: 64, 1: 65}
    for req_idx, length in lengths.items():
        fill(state, req_idx, length)
    size = POLICIES[name].state_bytes(spec.attention, 0.5, 700)
    expected = sum(state_tokens(length) * size.per_token + size.per_sequence for length in lengths.values())
    assert state.nbytes == expected
    state.close(3)
    assert state.nbytes == expected - state_tokens(500) * size.per_token - size.per_sequence


def test_long_heads_are_in_parts_and_their_keys_have_more_bits():
    assert [num_parts(head_dim) for head_dim in (64, 128, 136, 192, 256, 131)] == [1, 1, 4, 3, 4, 131]

    sizes = {
        (name, head_dim): POLICIES[name].state_bytes(small_spec(head_dim=head_dim).attention, 0.8, 100).per_token
        for name in ("sketch", "sketch-mean")
        for head_dim in (128, 136)
    }
    heads = small_spec().num_layers * small_spec().num_kv_heads
    assert sizes["sketch", 128] == heads * (64 + 4 + 32 + 4)
    assert sizes["sketch", 136] == heads * 4 * (34 + 4 + 9 + 4)
    assert sizes["sketch-mean", 136] == heads * 4 * (17 + 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["swa", "h2o", "sketch"])
def test_room_takes_no_memory_before_it_is_used(name):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    spec = small_spec(num_layers=16, num_kv_heads=4, head_dim=64)
    before = resident()
    state = start(make_policy(name, 0.8), 4, 4096, spec=spec, num_tokens=200_000)
    fill(state, 0, 512)
    assert sum(table.tensor.nbytes for table in state._tables) > 20 << 20
    assert resident() - before < 2 * state.nbytes + (8 << 20)


@pytest.mark.parametrize("max_buckets", [4, 7, 64])
@pytest.mark.parametrize("prompt", [1, 9, 30])
def test_buckets_keep_at_least_the_window(max_buckets, prompt, monkeypatch):
    """With w rows to a bucket the sum covers the last k rows and at most w - 1 more; w grows with the sequence."""
    monkeypatch.setattr(state_bytes, "MAX_BUCKETS", max_buckets)
    budget = Budget(0.5, dense_until=0)
    state = start(SparseWindow(budget), 1, 200)
    fill(state, 0, 200)
    num_rows = min(budget.recent(prompt), prompt)
    # every row puts its whole mass on position 0, so the sum there counts the rows
    rows = torch.zeros(num_rows, 1, prompt)
    rows[:, :, 0] = 1
    state.observe_prompt(0, 0, prompt - num_rows, 0, rows)
    for length in range(prompt + 1, 190):
        state.begin(make_batch([length]))
        window = budget.recent(length - 1)
        shared_by = max(1, 2 ** ceil(log2(window / max_buckets)))
        assert window <= float(state._sums[0, 0, 0]) <= window + shared_by - 1
        selection = state.select(0, torch.empty(0))
        mass = torch.zeros(selection.positions.shape)
        assert selection.positions[0, 0, 0] == 0
        mass[0, 0, 0] = 1
        state.on_attended(0, selection, mass)


@given(
    prompt=st.integers(1, 400),
    most=st.integers(1, 64),
    cuts=st.lists(st.integers(1, 399), max_size=3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_neither_chunks_nor_a_longer_maximum_change_the_sums(prompt, most, cuts, seed):
    budget = Budget(0.4, dense_until=0)
    num_rows = min(budget.recent(prompt), prompt)
    first = prompt - num_rows
    rows = torch.rand(num_rows, prompt, generator=torch.Generator().manual_seed(seed)).tril(first).unsqueeze(1)
    found = []
    for max_len, starts in ((prompt + most, []), (100_000, sorted({at for at in cuts if first < at < prompt}))):
        state = start(SparseWindow(budget), 1, max_len)
        fill(state, 0, prompt + most)
        for begin, end in pairwise([first, *starts, prompt]):
            state.observe_prompt(0, 0, begin, 0, rows[begin - first : end - first, :, :end])
        for length in range(prompt + 1, prompt + most):
            state.begin(make_batch([length]))
            selection = state.select(0, torch.empty(0))
            state.on_attended(0, selection, 1 / (1 + selection.positions.float()))
        found.append(state._sums[0, :, :prompt])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [1, 7, 16])
def test_sketched_keys_are_within_half_a_step(bits, head_dim):
    keys = torch.randn(50, 3, head_dim, generator=torch.Generator().manual_seed(head_dim)) * 5
    keys[0] = 2.5  # no range at all
    sketched = make_sketch(keys, bits)
    assert sketched.codes.shape == (50, 3, -(-head_dim * bits // 8))
    error = (unsketch(sketched, head_dim) - keys).abs()
    step, minimum = sketched.ranges.float().split(1, dim=-1)
    # Both are rounded to 11 bits: the minimum moves, and so does the value that the last code stands for.
    rounding = (minimum.abs() + (2**bits - 1) * step) * 2**-11 + 2**-24
    assert (error <= step / 2 * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_lie_in_planes_lowest_bits_first(bits):
    num_planes, head_dim = 8 // bits, 8 * (8 // bits) - 1
    keys = torch.arange(head_dim).remainder(2**bits)[None, None].float()
    keys[..., -1] = 2**bits - 1  # minimum 0, step 1: a key is its code
    codes, ranges, _, _ = make_sketch(keys, bits)
    assert ranges.tolist() == [[[1.0, 0.0]]]
    for i, byte in enumerate(codes[0, 0].tolist()):
        expected = [keys[0, 0, j].item() if j < head_dim else 0 for j in range(i, 8 * num_planes, 8)]
        assert [byte >> shift & (2**bits - 1) for shift in range(0, 8, bits)] == expected


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("native", [False, True])
def test_a_softcap_bends_the_weights_that_rank_and_complete(native, bits):
    """As in Gemma 2: a cap far below the scores leaves nearly equal weights, so that few tokens hold little of them."""
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 8, generator=generator) * 9, torch.randn(50, 2, 8, generator=generator)
    shares = []
    for softcap in (None, 0.01):
        state = start(
            KeySketch(Budget(0.8, dense_until=0), bits, completion="mean"),
            1,
            50,
            spec=replace(small_spec(), softcap=softcap),
            kernels=selection_kernels(native),
        )
        state.open(0, 50)
        state.reserve(0, 50)
        state.on_append(0, torch.zeros(50, dtype=torch.int64), torch.arange(50), keys, keys)
        state.begin(make_batch([50], [0]))
        num_read = state.select(0, query).num_tokens[0]
        shares.append(state._shares[0].tolist())
    assert shares[1] == pytest.approx([num_read / 50] * 4, rel=0.02)
    assert min(shares[0]) > 1.5 * max(shares[1])


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
    states = [
        start(KeySketch(budget, bits, per_head, "mean"), 2, capacity, spec=spec, kernels=kernels)
        for bits in (None, 8, 4, 2)
    ]
    for state in states:
        for req_idx, length in enumerate(lengths):
            fill(state, req_idx, length)
            state.on_append(
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
    num_heads = spec.num_layers * 3 * spec.num_kv_heads
    means = num_heads * 64 * 8
    for completion, sketched, summed in (("values", 36 + 20, 0), ("mean", 36, means), ("none", 36, 0)):
        state = start(KeySketch(Budget(0.8), completion=completion), 3, 128, spec=spec)
        for req_idx in range(3):
            fill(state, req_idx, 128)
        assert state.nbytes == num_heads * 128 * sketched + summed


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


@pytest.mark.parametrize("completion", ["mean", "values"])
@pytest.mark.parametrize("native", [False, True])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_weight_that_is_not_read_goes_to_the_mean_or_to_the_sketched_values(native, completion, data):
    """Ragged req_indices that held others before, prompts in pieces: out = a out(read) + (1 - a) mean(V), or the sum of
    w v over the other tokens, a and w for each head."""
    num_kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    num_heads, head_dim = num_kv_heads * data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([16, 192]))
    spec = small_spec(num_kv_heads=num_kv_heads, num_heads=num_heads, head_dim=head_dim)
    parts = num_parts(head_dim)
    bits = data.draw(st.sampled_from([None, 8])) if completion == "mean" else data.draw(st.sampled_from([4, 8]))
    per_head = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    capacity, budget = 70, Budget(0.8, dense_until=0)
    state = start(
        KeySketch(budget, bits, per_head, completion), 4, capacity, spec=spec, kernels=selection_kernels(native)
    )
    keys, values = torch.randn(2, 3, capacity, spec.num_kv_heads, spec.head_dim, generator=generator).unbind()
    query = torch.randn(len(lengths), spec.num_heads, spec.head_dim, generator=generator)
    req_indices = [3, 0, 2][: len(lengths)]
    for req_idx, length in zip(req_indices, lengths, strict=True):
        fill(state, req_idx, capacity)
        former = torch.randn(9, spec.num_kv_heads, spec.head_dim, generator=generator)
        state.on_append(1, torch.full((9,), req_idx), torch.arange(9), former, former)
        fill(state, req_idx, capacity)
        cut = data.draw(st.integers(0, length - 1))
        for piece in (range(cut), range(cut, length)):
            rows = slice(piece.start, piece.stop)
            owner, places = torch.full((len(piece),), req_idx), torch.tensor(list(piece), dtype=torch.int64)
            state.on_append(
                1, owner, places, keys[req_indices.index(req_idx), rows], values[req_indices.index(req_idx), rows]
            )
    state.begin(make_batch(lengths, req_indices))
    selection = state.select(1, query)
    out = torch.randn(query.shape, generator=generator)
    completed = state.combine(1, Attended(out, torch.empty(0), torch.empty(0)))
    for row, length in enumerate(lengths):
        of_sets = selection.positions[row, :, : selection.num_tokens[row]].tolist()
        known = keys[row, :length] if bits is None else unsketch(make_sketch(keys[row, :length], bits, parts), head_dim)
        _, weights = plain_attention(query[row], known, values[row, :length])
        sketched = unsketch(make_sketch(values[row, :length], 2, parts), head_dim).double()
        for head in range(spec.num_heads):
            chosen = of_sets[head * len(of_sets) // spec.num_heads]
            kv_head = head * num_kv_heads // spec.num_heads
            share = weights[head, chosen].sum()
            left = weights[head].clone()
            left[chosen] = 0
            rest = left @ sketched[:, kv_head]
            if completion == "mean":
                rest = (1 - share) * values[row, :length, kv_head].mean(dim=0)
            expected = (share * out[row, head] + rest).float()
            # The query is rounded to a 32639th, which moves a score by a thousandth at the most.
            torch.testing.assert_close(completed[row, head], expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("completion", ["values", "mean", "none"])
def test_reading_everything_leaves_attention_as_it_is(completion):
    spec = small_spec()
    state = start(
        KeySketch(Budget(0.0), completion=completion), 1, 40, spec=spec, kernels=selection_kernels(library.available())
    )
    fill(state, 0, 40)
    keys = torch.randn(30, spec.num_kv_heads, spec.head_dim)
    state.on_append(0, torch.zeros(30, dtype=torch.int64), torch.arange(30), keys, keys)
    state.begin(make_batch([30]))
    query = torch.randn(1, spec.num_heads, spec.head_dim)
    state.select(0, query)
    assert torch.equal(state.combine(0, Attended(query, torch.empty(0), torch.empty(0))), query)


def test_each_completion_brings_thinly_spread_attention_closer_than_the_one_before():
    """Weights that differ little: a fifth of the tokens says less than it and the mean of all, or all in two bits."""
    spec = small_spec()
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 50, spec.num_kv_heads, spec.head_dim, generator=generator).unbind()
    query = torch.randn(1, spec.num_heads, spec.head_dim, generator=generator) * 0.5
    req_indices = torch.zeros(50, dtype=torch.int64)
    errors = []
    for completion in ("none", "mean", "values"):
        state = start(KeySketch(Budget(0.8, dense_until=0), completion=completion), 1, 50, spec=spec)
        fill(state, 0, 50)
        state.on_append(0, req_indices, torch.arange(50), keys, values)
        state.begin(make_batch([50]))
        chosen = state.select(0, query).positions[0, 0].tolist()
        out, _ = plain_attention(query[0], keys, values, [chosen] * spec.num_heads)
        completed = state.combine(0, Attended(out.float()[None], torch.empty(0), torch.empty(0)))
        dense, _ = plain_attention(query[0], keys, values)
        errors.append(float((completed[0] - dense).norm()))
    assert errors[2] < errors[1] / 1.5 < errors[0] / 3
