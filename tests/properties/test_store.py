"""The KV store as a state machine, against a dictionary: append, release, reuse, cap."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alisa.errors import CapacityError
from alisa.kv.codec import FloatCodec
from alisa.kv.store import KVStore
from alisa.types import Medium, RowFormat, Segment

NUM_LAYERS, NUM_ROWS, NUM_LANES, MAX_LENGTH = 2, 24, 4, 12
FORMAT = RowFormat("float32", num_kv_heads=2, head_dim=3)


def make_store():
    return KVStore(
        num_layers=NUM_LAYERS,
        codec=FloatCodec(FORMAT),
        num_rows=NUM_ROWS,
        num_lanes=NUM_LANES,
        max_length=MAX_LENGTH,
        device=torch.device("cpu"),
    )


class StoreMachine(RuleBasedStateMachine):
    """`model` maps a lane to (reservation, {layer: [K and V of each token]})."""

    def __init__(self):
        super().__init__()
        self.store = make_store()
        self.model = {}
        self.counter = 0.0

    def values(self, count):
        """K and V that no other token has."""
        self.counter += count
        base = torch.arange(self.counter - count, self.counter)[:, None, None]
        return base + torch.arange(6).view(2, 3) / 100, -base - torch.arange(6).view(2, 3) / 100

    @rule(num_tokens=st.integers(1, MAX_LENGTH + 2))
    def open(self, num_tokens):
        reserved = sum(size for size, _ in self.model.values())
        fits = num_tokens <= MAX_LENGTH and len(self.model) < NUM_LANES and reserved + num_tokens <= NUM_ROWS
        if fits:
            assert self.store.can_open(num_tokens)
            lane = self.store.open(num_tokens)
            assert lane not in self.model
            self.model[lane] = (num_tokens, {layer: [] for layer in range(NUM_LAYERS)})
        else:
            with pytest.raises(CapacityError, match=str(num_tokens)):
                self.store.open(num_tokens)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data):
        lanes = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        segments = []
        for lane in lanes:
            size, rows = self.model[lane]
            count = data.draw(st.integers(0, size - len(rows[0])))
            segments.append(Segment(lane, len(rows[0]), count))
        total = sum(segment.count for segment in segments)
        writer = self.store.extend(segments)
        for layer in range(NUM_LAYERS):
            k, v = self.values(total)
            writer.append(layer, k, v)
            start = 0
            for segment in segments:
                part = slice(start, start + segment.count)
                self.model[segment.lane][1][layer] += list(zip(k[part], v[part], strict=True))
                start = part.stop

    @precondition(lambda self: self.model)
    @rule(data=st.data(), excess=st.integers(1, 3))
    def refuse(self, data, excess):
        """Rows beyond the reservation, or with a gap, are refused and change nothing."""
        lane = data.draw(st.sampled_from(sorted(self.model)))
        size, rows = self.model[lane]
        with pytest.raises(CapacityError, match=f"Lane {lane}"):
            self.store.extend([Segment(lane, len(rows[0]), size - len(rows[0]) + excess)])
        with pytest.raises(CapacityError, match=f"Lane {lane}"):
            self.store.extend([Segment(lane, len(rows[0]) + excess, 1)])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data):
        lane = data.draw(st.sampled_from(sorted(self.model)))
        self.store.release(lane)
        del self.model[lane]

    @invariant()
    def agrees(self):
        self.store.check()
        assert self.store.used_rows == sum(len(rows[0]) for _, rows in self.model.values())
        assert self.store.reserved_rows == sum(size for size, _ in self.model.values()) <= NUM_ROWS
        assert self.store.nbytes(Medium.DEVICE) == self.store.used_rows * NUM_LAYERS * FORMAT.row_bytes
        for lane, (_, rows) in self.model.items():
            assert self.store.length(lane) == len(rows[0])
            for layer, pairs in rows.items():
                k, v = self.store.read(layer, lane, len(pairs))
                table = self.store.slot_table(torch.tensor([lane]), len(pairs))[0]
                by_slot = self.store.codec.decode(self.store.rows(layer)[table.long()])
                for position, (expected_k, expected_v) in enumerate(pairs):
                    assert torch.equal(k[position], expected_k)
                    assert torch.equal(v[position], expected_v)
                    assert torch.equal(by_slot[0][position], expected_k)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_check_notices_a_lost_slot():
    store = make_store()
    store.open(3)
    store._free_slots.pop()
    with pytest.raises(AssertionError, match="lost"):
        store.check()
