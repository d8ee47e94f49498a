"""Policy state in one space: any sequences that fit in sum fit, and nothing is lost when they move."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alisa.budget import STATE_BLOCK_TOKENS, Budget, state_tokens
from alisa.kernels.base import StepBatch
from alisa.kernels.reference.selection import ReferenceSelection
from alisa.policy.extents import Extents
from alisa.policy.h2o import HeavyHitters
from alisa.policy.sketch import KeySketch
from alisa.policy.swa import SparseWindow
from alisa.policy.token_state import TokenState
from tests.specs import small_spec

CPU = torch.device("cpu")
MAX_NUM_SEQS = 6
NUM_BLOCKS = 10
SPACE = NUM_BLOCKS * STATE_BLOCK_TOKENS


class Tables(TokenState):
    """A table whose tokens begin with 0, after other dimensions, and one whose tokens begin with anything."""

    def __init__(self):
        super().__init__(max_num_seqs=MAX_NUM_SEQS, num_tokens=SPACE + 5, device=CPU)
        self.sums = self._new_table((2, 3), (), torch.float64, zeroed=True)
        self.keys = self._new_table((), (2,), torch.int32)
        self.keys.fill_(-1)
        self.sums.fill_(-1)
        self.located = None

    def _locate(self, batch, starts):
        self.located = starts

    def ids(self, req_idx, positions):
        return self._token_ids(torch.full((len(positions),), req_idx), torch.tensor(positions, dtype=torch.int64))


class StateMachine(RuleBasedStateMachine):
    """Sequences come, grow and go; a dictionary of plain lists says what each table has to hold."""

    @initialize()
    def begin(self):
        self.state = Tables()
        self.model = {}
        self.reserved = {}
        self.next_value = 1
        self.batch = ()

    def room(self, without=None):
        taken = sum(state_tokens(n) for req_idx, n in self.reserved.items() if req_idx != without)
        return SPACE - taken

    @rule(req_idx=st.integers(0, MAX_NUM_SEQS - 1), expected=st.integers(0, SPACE))
    def open(self, req_idx, expected):
        if req_idx not in self.model:
            self.state.open(req_idx, expected)
            self.model[req_idx], self.reserved[req_idx] = [], 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def grow(self, data):
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        length = len(self.model[req_idx])
        count = data.draw(
            st.integers(0, self.room(req_idx) - length) | st.integers(0, min(70, self.room(req_idx) - length))
        )
        self.state.reserve(req_idx, length + count)
        self.reserved[req_idx] = max(self.reserved[req_idx], length + count)
        new = list(range(self.next_value, self.next_value + count))
        self.next_value += count
        if new:
            ids = self.state.ids(req_idx, list(range(length, length + count)))
            assert (self.state.sums[..., ids] == 0).all()
            values = torch.tensor(new)
            self.state.sums[..., ids] += values * torch.arange(1, 7).view(2, 3, 1)
            self.state.keys[ids] = torch.stack((values, -values), dim=1).int()
        self.model[req_idx] += new

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def close(self, data):
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        self.state.close(req_idx)
        del self.model[req_idx], self.reserved[req_idx]
        self.batch = ()

    @precondition(lambda self: any(self.model.values()))
    @rule(data=st.data())
    def step(self, data):
        lengths = {req_idx: len(values) for req_idx, values in self.model.items() if values}
        self.batch = tuple(data.draw(st.lists(st.sampled_from(sorted(lengths)), min_size=1, unique=True)))
        of_batch = tuple(lengths[req_idx] for req_idx in self.batch)
        self.state.begin(StepBatch(self.batch, of_batch, torch.tensor(self.batch), torch.tensor(of_batch).int()))

    @invariant()
    def every_token_is_where_it_belongs(self):
        for req_idx, values in getattr(self, "model", {}).items():
            ids = self.state.ids(req_idx, list(range(len(values))))
            expected = torch.tensor(values, dtype=torch.int64)
            assert torch.equal(self.state.sums[..., ids], (expected * torch.arange(1, 7).view(2, 3, 1)).double())
            assert torch.equal(self.state.keys[ids], torch.stack((expected, -expected), dim=1).int())

    @invariant()
    def a_step_knows_where_its_sequences_are(self):
        for row, req_idx in enumerate(getattr(self, "batch", ())):
            assert self.state.located[row] == self.state.ids(req_idx, [0])[0]

    @invariant()
    def what_is_used_is_counted(self):
        if hasattr(self, "reserved"):
            tokens = sum(state_tokens(n) for n in self.reserved.values())
            assert self.state.nbytes == tokens * (6 * 8 + 2 * 4)


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_full_space_can_be_filled_in_any_order():
    """Sequences that grow in turns by single blocks, until nothing is free."""
    extents = Extents(SPACE)
    for req_idx in range(3):
        extents.open(req_idx, SPACE)
    for blocks in range(NUM_BLOCKS):
        extents.reserve(blocks % 3, (blocks // 3 + 1) * STATE_BLOCK_TOKENS)
    assert extents.used_tokens == extents.num_tokens
    extents.close(1)
    extents.open(5, SPACE)
    extents.reserve(5, 3 * STATE_BLOCK_TOKENS)
    with pytest.raises(AssertionError, match="do not fit"):
        extents.reserve(0, 5 * STATE_BLOCK_TOKENS)


def test_a_lonely_sequence_never_moves():
    extents = Extents(SPACE)
    extents.open(2, 1)
    assert all(extents.reserve(2, n) == [] for n in range(1, extents.num_tokens + 1))


def test_neighbours_leave_each_other_room():
    """Two sequences of any length that grow together fill half the space before one of them moves."""
    extents = Extents(64 * STATE_BLOCK_TOKENS)
    for req_idx in range(2):
        extents.open(req_idx, extents.num_tokens)
    for blocks in range(1, 30):
        assert not any(extents.reserve(req_idx, blocks * STATE_BLOCK_TOKENS) for req_idx in range(2))


def test_sequences_of_known_length_lie_close_together_and_never_move():
    """A later one takes the first place that is left to it, and grows into room that was kept for it."""
    extents, block = Extents(100 * STATE_BLOCK_TOKENS), STATE_BLOCK_TOKENS
    for req_idx in range(3):
        extents.open(req_idx, 5 * block)
        assert extents.reserve(req_idx, 2 * block) == []
    assert [extents.start(req_idx) for req_idx in range(3)] == [0, 5 * block, 10 * block]
    extents.close(1)
    extents.open(3, 6 * block)
    extents.open(4, 5 * block)
    for blocks in range(1, 6):
        for req_idx in (0, 2, 3, 4):
            assert extents.reserve(req_idx, max(2, blocks) * block) == []
    assert [extents.start(req_idx) for req_idx in (3, 4)] == [15 * block, 5 * block]


class Neighbours:
    """Others that come, grow and go, so that a sequence beside them has to move."""

    def __init__(self, state, num_tokens):
        self.state = state
        self.num_tokens = num_tokens
        self.lengths = {}
        self.random = random.Random(0)

    def crowd(self, taken):
        """One of them changes; the state has room for `taken` tokens of another."""
        req_idx = self.random.choice((0, 2, 3))
        if self.free(taken) < 0 and req_idx not in self.lengths:
            req_idx = next(iter(self.lengths))
        while self.free(taken) < 0 or (req_idx in self.lengths and self.random.random() < 0.5):
            self.state.close(req_idx)
            del self.lengths[req_idx]
            req_idx = next(iter(self.lengths), req_idx)
        if req_idx not in self.lengths:
            self.state.open(req_idx, self.num_tokens)
            self.lengths[req_idx] = 0
        most = state_tokens(self.lengths[req_idx]) + self.free(taken)
        self.lengths[req_idx] = self.random.randint(self.lengths[req_idx], most)
        self.state.reserve(req_idx, self.lengths[req_idx])

    def free(self, taken):
        return self.num_tokens - state_tokens(taken) - sum(map(state_tokens, self.lengths.values()))


@pytest.mark.parametrize(
    "policy", [HeavyHitters(Budget(0.5)), SparseWindow(Budget(0.5), per_head=True), KeySketch(Budget(0.5))]
)
def test_a_sequence_that_moves_selects_what_it_would_have_selected(policy):
    """Also where it moves after the step has begun, as when the next step's rows were chosen ahead."""
    shape, num_tokens = small_spec().attention, 12 * STATE_BLOCK_TOKENS
    crowded, alone = (
        policy.start(
            shape, max_num_seqs=4, num_tokens=num_tokens, max_len=400, device=CPU, kernels=ReferenceSelection()
        )
        for _ in range(2)
    )
    neighbours, places = Neighbours(crowded, num_tokens), []
    neighbours.crowd(STATE_BLOCK_TOKENS)  # the first of all would never have to move
    for state in (crowded, alone):
        state.open(1, num_tokens)
    for length in range(1, 300):
        generator = torch.Generator().manual_seed(length)
        keys, values = torch.randn(2, 1, shape.num_kv_heads, shape.head_dim, generator=generator).unbind()
        query = torch.randn(1, shape.num_heads, shape.head_dim, generator=generator)
        batch = StepBatch((1,), (length,), torch.tensor([1]), torch.tensor([length], dtype=torch.int32))
        mass = torch.rand(1, policy.num_sets(shape), 1 + sum(policy.reads(length - 1)), generator=generator)
        chosen = []
        for state in (crowded, alone):
            state.reserve(1, length)
            state.begin(batch)
            if state is crowded:
                neighbours.crowd(length + 1)
                places.append(state._extents.start(1))
            state.on_append(0, batch.req_index, batch.length_counts.long() - 1, keys, values)
            selection = state.select(0, query)
            state.on_attended(0, selection, mass)
            chosen.append(selection.positions)
        assert torch.equal(*chosen)
    assert sum(before != after for before, after in pairwise(places)) > 3


def test_the_same_tokens_are_found_again_after_a_move():
    state = Tables()
    for req_idx in range(2):
        state.open(req_idx, SPACE)
        state.reserve(req_idx, 1)
    tokens = torch.tensor([1]), torch.tensor([0])
    before = state._token_ids(*tokens).tolist()
    assert state._token_ids(*tokens).tolist() == before
    state.reserve(0, SPACE - STATE_BLOCK_TOKENS)
    assert state._token_ids(*tokens).tolist() == [state._extents.start(1)] != before


def test_a_sequence_that_has_left_a_step_is_not_looked_for():
    """Its index may have a new owner, of whom nothing is known, when others move."""
    shape, blocks = small_spec().attention, 6
    state = SparseWindow(Budget(0.5)).start(
        shape,
        max_num_seqs=3,
        num_tokens=blocks * STATE_BLOCK_TOKENS,
        max_len=400,
        device=CPU,
        kernels=ReferenceSelection(),
    )
    for req_idx in range(3):
        state.open(req_idx, 20)
        state.reserve(req_idx, 20)
    lengths = torch.full((3,), 20, dtype=torch.int32)
    state.begin(StepBatch((0, 1, 2), (20, 20, 20), torch.arange(3), lengths))
    before = [state._extents.start(req_idx) for req_idx in (1, 2)]
    state.close(0)
    state.open(0, 400)
    state.reserve(0, (blocks - 2) * STATE_BLOCK_TOKENS)
    assert [state._extents.start(req_idx) for req_idx in (1, 2)] != before
