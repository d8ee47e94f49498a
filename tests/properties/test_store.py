"""The KV store as a state machine, against a dictionary: append, release, share, reuse, cap."""

import itertools
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alisa.cache.store import CHUNK_TOKENS, KVStore
from alisa.errors import CapacityError
from alisa.outputs import Medium
from alisa.scheduler.plan import ScheduledChunk
from tests.kv_cases import CODEC, FORMAT, layer_inputs, plan_of, project, read_chunks, selection_of, some_positions

# Few enough rows that sequences compete for them, enough that there is a reserve to hand out.
NUM_LAYERS, NUM_ROWS, NUM_LANES, MAX_LENGTH = 2, 3 * CHUNK_TOKENS, 4, 20


def make_store():
    return KVStore(
        num_layers=NUM_LAYERS,
        codec=CODEC,
        num_rows=NUM_ROWS,
        max_num_seqs=NUM_LANES,
        max_length=MAX_LENGTH,
        device=torch.device("cpu"),
    )


class StoreMachine(RuleBasedStateMachine):
    """`model` maps a request index to the rows of its tokens, UInt8[L, n, row_bytes], `owned` to numbers of these rows:
    two sequences that share a row have its number."""

    def __init__(self):
        super().__init__()
        self.store = make_store()
        self.model, self.owned = {}, {}
        self.num_written = 0
        self.numbers = itertools.count()

    def length(self, req_idx):
        return self.model[req_idx].shape[1]

    @property
    def used(self):
        """Rows, those that are shared once."""
        return len({number for numbers in self.owned.values() for number in numbers})

    @rule(req_idx=st.integers(0, NUM_LANES - 1), num_tokens=st.integers(1, MAX_LENGTH + 2))
    def open(self, req_idx, num_tokens):
        """Opening takes a request index and no rows."""
        if num_tokens > MAX_LENGTH:
            with pytest.raises(CapacityError, match=str(num_tokens)):
                self.store.open(req_idx, num_tokens)
        elif req_idx in self.model:
            with pytest.raises(AssertionError, match=f"request index {req_idx} is in use"):
                self.store.open(req_idx, num_tokens)
        else:
            self.store.open(req_idx, num_tokens)
            self.model[req_idx] = np.empty((NUM_LAYERS, 0, FORMAT.row_bytes), np.uint8)
            self.owned[req_idx] = []

    @precondition(lambda self: any(self.length(req_idx) < MAX_LENGTH for req_idx in self.model))
    @rule(seed=st.integers(0, 2**32 - 1), most=st.sampled_from((1, MAX_LENGTH)))
    def step(self, seed, most):
        """New tokens of some sequences; refused exactly when there are more than free rows, whoever holds a reserve."""
        draw = np.random.default_rng(seed)
        growing = [req_idx for req_idx in sorted(self.model) if self.length(req_idx) < MAX_LENGTH]
        req_indices = draw.permutation(growing)[: draw.integers(1, len(growing) + 1)].tolist()
        counts = [int(draw.integers(1, min(most, MAX_LENGTH - self.length(req_idx)) + 1)) for req_idx in req_indices]
        chunks = [
            ScheduledChunk(req_idx, self.length(req_idx), count)
            for req_idx, count in zip(req_indices, counts, strict=True)
        ]
        if self.used + sum(counts) > NUM_ROWS:
            with pytest.raises(CapacityError, match=f"{sum(counts)} new tokens need .* of {NUM_ROWS} rows are free"):
                self.store.begin(plan_of(chunks))
            return
        # Of a decode step with several tokens of a sequence, each would choose for itself.
        self.store.begin(plan_of(chunks, prefill=max(counts) > 1))
        hidden = layer_inputs(self.num_written, sum(counts))
        self.num_written += sum(counts)
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        written = []
        for layer in range(NUM_LAYERS):
            k, v = project(layer, hidden, positions)
            self.store.append(layer, k, v, hidden)
            written.append(CODEC.encode(k, v).numpy())
        for req_idx, rows in zip(req_indices, np.split(np.stack(written), np.cumsum(counts)[:-1], axis=1), strict=True):
            self.model[req_idx] = np.concatenate((self.model[req_idx], rows), axis=1)
            self.owned[req_idx] = [*self.owned[req_idx], *islice(self.numbers, rows.shape[1])]
        chosen = [some_positions(draw, chunk.end) for chunk in chunks]
        selection = selection_of(chosen)
        for layer in range(NUM_LAYERS):
            found = read_chunks(self.store.chunks(layer, selection), FORMAT.row_bytes, selection)
            for req_idx, at, rows in zip(req_indices, chosen, found, strict=True):
                assert np.array_equal(rows[: len(at)], self.model[req_idx][layer, at])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), excess=st.integers(1, 3))
    def refuse(self, data, excess):
        """Positions beyond the longest sequence, or with a gap, are refused and change nothing."""
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        length = self.length(req_idx)
        growing = [other for other in sorted(self.model) if other != req_idx and self.length(other) < MAX_LENGTH]
        others = [ScheduledChunk(other, self.length(other), 1) for other in growing]
        for wrong in (
            ScheduledChunk(req_idx, length, MAX_LENGTH - length + excess),
            ScheduledChunk(req_idx, length + excess, 1),
        ):
            with pytest.raises(CapacityError, match=f"Request index {req_idx}"):
                self.store.begin(plan_of([*others, wrong]))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data):
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        self.store.release(req_idx)
        del self.model[req_idx], self.owned[req_idx]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        """The rows before the cut stay, those after it make room."""
        req_idx = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(0, self.length(req_idx)))
        self.store.truncate(req_idx, length)
        self.model[req_idx], self.owned[req_idx] = self.model[req_idx][:, :length], self.owned[req_idx][:length]

    @precondition(lambda self: self.model and len(self.model) < NUM_LANES)
    @rule(data=st.data())
    def fork(self, data):
        """Another sequence has the first rows of one, in as many steps; no row is taken."""
        source = data.draw(st.sampled_from(sorted(self.model)))
        edge = st.just(self.length(source)) | st.integers(0, self.length(source))
        cuts = data.draw(st.lists(edge, min_size=1, max_size=3, unique=True).map(sorted))
        req_idx = next(index for index in range(NUM_LANES) if index not in self.model)
        self.store.open(req_idx, MAX_LENGTH)
        for start, end in pairwise((0, *filter(None, cuts))):
            chunk = ScheduledChunk(req_idx, start, end - start, source)
            self.store.begin(plan_of([chunk]))
            for layer in range(NUM_LAYERS):
                self.store.copy(layer, chunk)
        length = max(cuts)
        self.model[req_idx], self.owned[req_idx] = self.model[source][:, :length], self.owned[source][:length]

    @precondition(lambda self: any(map(self.store.num_shared, self.model)))
    @rule()
    def unshare(self):
        """Every sequence has the same rows as before, and nobody else has them."""
        if sum(map(self.length, self.model)) > NUM_ROWS:
            return
        self.store.unshare()
        self.owned = {req_idx: list(islice(self.numbers, self.length(req_idx))) for req_idx in self.model}

    @invariant()
    def agrees(self):
        self.store.check()
        assert self.store.used_rows == self.used <= NUM_ROWS
        assert self.store.nbytes(Medium.DEVICE) == self.used * NUM_LAYERS * FORMAT.row_bytes
        assert self.store.nbytes(Medium.DISK) == 0
        for req_idx, layers in self.model.items():
            assert self.store.length(req_idx) == layers.shape[1]
            table = self.store.slot_table(torch.tensor([req_idx]), layers.shape[1])[0].long()
            for layer, rows in enumerate(layers):
                assert np.array_equal(CODEC.encode(*self.store.read(layer, req_idx, 0, len(rows))).numpy(), rows)
                assert np.array_equal(self.store.rows(layer)[table].numpy(), rows)
        owned = [number for req_idx in self.model for number in self.owned[req_idx]]
        tables = [self.store.slot_table(torch.tensor([i]), self.length(i))[0].tolist() for i in self.model]
        pairs = set(zip(owned, itertools.chain(*tables), strict=True))
        assert len(pairs) == self.used == len({slot for _, slot in pairs}), "a row has two places, or a place two rows"


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30)


def test_reserves_are_taken_back_when_rows_are_short():
    store = make_store()
    first, second, third = range(3)
    store.open(first, MAX_LENGTH)
    store.open(second, MAX_LENGTH)
    store.begin(plan_of([ScheduledChunk(first, 0, 1)]))
    assert len(store._free_slots) == NUM_ROWS - CHUNK_TOKENS
    store.open(third, MAX_LENGTH)
    store.begin(plan_of([ScheduledChunk(second, 0, MAX_LENGTH)]))
    store.begin(plan_of([ScheduledChunk(third, 0, MAX_LENGTH)]))
    store.check()
    assert store.used_rows == 2 * MAX_LENGTH + 1


def test_check_notices_a_lost_slot():
    store = make_store()
    store.open(0, 3)
    store._free_slots.take(1)
    with pytest.raises(AssertionError, match="lost"):
        store.check()
