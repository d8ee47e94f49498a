"""The tiered store, case by case: transfers that are late, tiers that fail, what is counted. The rest is in
tests/properties/test_tiered_store.py."""

import os

import numpy as np
import pytest
import torch

from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import DiskTier, HostTier
from alisa.errors import CapacityError
from alisa.outputs import Medium
from alisa.scheduler.plan import Move, ScheduledChunk
from tests.kv_cases import (
    CODEC,
    FORMAT,
    HIDDEN_BYTES,
    LatePool,
    WornTier,
    hidden_in,
    layer_inputs,
    owner_of,
    plan_of,
    project,
    read_chunks,
    selection_of,
)

NUM_LAYERS = 2
DEVICE, HOST, DISK = Medium.DEVICE, Medium.HOST, Medium.DISK


class Rows:
    """A small store, and what its rows must be; token n of req_idx l is number 100 * l + n, in any store."""

    def __init__(self, num_rows=8, tiers=None, rebuildable=0, staging_rows=4, late=False):
        self.tiers = tiers or [HostTier(NUM_LAYERS, 32, FORMAT.row_bytes)]
        hidden_tier = HostTier(NUM_LAYERS, 4 * rebuildable, HIDDEN_BYTES)
        self.store = TieredStore(
            num_layers=NUM_LAYERS,
            codec=CODEC,
            num_rows=num_rows,
            max_num_seqs=4,
            max_length=32,
            tiers=self.tiers,
            hidden=hidden_in(hidden_tier) if rebuildable else None,
            rebuildable=rebuildable,
            staging_rows=staging_rows,
            piece_columns=min(staging_rows, 2),
        )
        self.pool = LatePool()
        if late:
            self.store._transfers._pool = self.pool

    def expected(self, layer, req_idx, positions):
        at = torch.tensor(positions)
        hidden = torch.cat([layer_inputs(100 * req_idx + position, 1) for position in positions])
        return CODEC.encode(*project(layer, hidden, at)).numpy()

    def step(self, counts, moves=(), *, prefill=False):
        """New tokens for some req_indices: {req_idx: how many}."""
        chunks = [ScheduledChunk(req_idx, self.store.length(req_idx), count) for req_idx, count in counts.items()]
        self.store.begin(plan_of(chunks, moves, prefill=prefill))
        hidden = torch.cat([layer_inputs(100 * s.req_idx + s.start, s.count) for s in chunks])
        positions = torch.cat([torch.arange(s.start, s.end) for s in chunks])
        for layer in range(NUM_LAYERS):
            self.store.append(layer, *project(layer, hidden, positions), hidden)

    def select(self, chosen, layers=range(NUM_LAYERS)):
        """Read {req_idx: positions} of the running step's req_indices in some layers; which req_indices are right."""
        selection = selection_of(list(chosen.values()))
        right = set(chosen)
        for layer in layers:
            found = read_chunks(self.store.chunks(layer, selection), FORMAT.row_bytes, selection)
            for (req_idx, at), rows in zip(chosen.items(), found, strict=True):
                if not np.array_equal(rows[: len(at)], self.expected(layer, req_idx, at)):
                    right.discard(req_idx)
        return right

    def prefetch(self, chosen):
        for layer in range(NUM_LAYERS):
            self.store.prefetch(layer, tuple(chosen), selection_of(list(chosen.values())))

    def is_right(self, req_idx):
        """Whether every row of a request index reads back as it was written."""
        length = self.store.length(req_idx)
        found = [CODEC.encode(*self.store.read(layer, req_idx, 0, length)).numpy() for layer in range(NUM_LAYERS)]
        wanted = [self.expected(layer, req_idx, list(range(length))) for layer in range(NUM_LAYERS)]
        return np.array_equal(found, wanted)


def fill(rows, req_idx, count, moves=()):
    rows.store.open(req_idx, 32)
    rows.step({req_idx: count}, moves, prefill=True)


# --- transfers that are late -----------------------------------------------------------------------------------------


def test_a_deleted_row_that_is_still_being_fetched_keeps_its_slot_until_then():
    rows = Rows(16, tiers=[HostTier(NUM_LAYERS, 4, FORMAT.row_bytes)], rebuildable=4, late=True)
    fill(rows, 0, 8, [Move(0, 0, 4, DEVICE, HOST)])
    fill(rows, 1, 4)
    rows.step({0: 1})
    assert rows.select({0: [8]}) == {0}
    rows.prefetch({0: [0, 1, 9]})
    # Request index 0's rows are deleted while they are fetched, and req_idx 1 gets their slots below at once.
    rows.step({0: 1}, [Move(0, 0, 4, HOST, None), Move(1, 0, 4, DEVICE, HOST)])
    for index in reversed(range(len(rows.pool.pending))):
        rows.pool.run(index)
    assert rows.select({0: [0, 1, 9]}) == {0}
    assert rows.is_right(1)


def test_rows_on_their_way_down_arrive_before_their_slots_have_another_owner():
    rows = Rows(12, tiers=[HostTier(NUM_LAYERS, 4, FORMAT.row_bytes)], rebuildable=4, late=True)
    fill(rows, 0, 4)
    fill(rows, 1, 4)
    rows.step({0: 1}, [Move(0, 0, 4, DEVICE, HOST)])
    rows.step({0: 1}, [Move(0, 0, 4, HOST, None), Move(1, 0, 4, DEVICE, HOST)])
    for index in reversed(range(len(rows.pool.pending))):
        rows.pool.run(index)
    fill(rows, 2, 9)  # the copies on the device have to leave
    assert rows.is_right(0)
    assert rows.is_right(1)


def test_rows_on_their_way_down_arrive_before_they_go_further_down():
    tiers = [HostTier(NUM_LAYERS, 8, FORMAT.row_bytes), HostTier(NUM_LAYERS, 8, FORMAT.row_bytes)]
    tiers[1].medium = DISK
    rows = Rows(tiers=tiers, late=True)
    fill(rows, 0, 6)
    rows.step({0: 1}, [Move(0, 0, 4, DEVICE, HOST)])
    rows.step({0: 1}, [Move(0, 0, 4, HOST, DISK)])
    fill(rows, 1, 4)  # the copies on the device have to leave
    assert rows.is_right(0)
    assert rows.is_right(1)


def test_rows_fetched_ahead_keep_their_place_through_a_prefill_step():
    rows = Rows(10, late=True)
    fill(rows, 0, 6, [Move(0, 0, 4, DEVICE, HOST)])
    fill(rows, 1, 3)
    rows.step({0: 2})
    rows.prefetch({0: [0, 1, 8]})
    fill(rows, 2, 1)  # takes the last free rows of the device
    rows.step({1: 1})  # what was fetched ahead has to leave
    for index in reversed(range(len(rows.pool.pending))):
        rows.pool.run(index)
    assert rows.is_right(1)


# --- sequences that end while rows are on their way ------------------------------------------------------------------


def test_a_release_waits_for_its_own_rows_only():
    """Stores, loads and prefetched rows of two sequences are under way; one of them is aborted."""
    rows = Rows(24, late=True)
    fill(rows, 0, 6, [Move(0, 0, 4, DEVICE, HOST)])
    fill(rows, 1, 6, [Move(1, 0, 4, DEVICE, HOST)])
    rows.step({0: 1, 1: 1})
    assert rows.select({0: [0, 6], 1: [0, 6]}) == {0, 1}
    rows.prefetch({0: [1, 2, 7]})
    rows.prefetch({1: [1, 2, 7]})
    rows.step({0: 1, 1: 1}, [Move(0, 4, 6, DEVICE, HOST), Move(1, 4, 6, DEVICE, HOST)])
    before = len(rows.pool.pending)
    assert before == 2 * NUM_LAYERS + 2, "prefetched rows layer by layer, and a store for each"
    rows.store.release(1)
    assert len(rows.pool.pending) == before - NUM_LAYERS - 1
    rows.store.check()
    rows.step({0: 1})
    assert rows.select({0: [0, 1, 2, 8]}) == {0}
    assert rows.is_right(0)


@pytest.mark.parametrize("late", [False, True])
def test_what_a_released_sequence_had_is_there_for_others_at_once(late):
    """Every slot of the device, of the tier and of the hidden states had an owner that was in the middle of things."""
    rows = Rows(8, tiers=[HostTier(NUM_LAYERS, 8, FORMAT.row_bytes)], rebuildable=8, late=late)
    for _ in range(3):
        fill(rows, 0, 12, [Move(0, 0, 8, DEVICE, HOST)])
        rows.step({0: 1}, [Move(0, 0, 2, HOST, None), Move(0, 8, 10, DEVICE, HOST)])
        assert rows.select({0: [0, 3, 12]}) == {0}
        rows.prefetch({0: [1, 2, 9, 13]})
        rows.store.release(0)
        rows.store.check()
        assert rows.store.nbytes(DEVICE) == rows.store.nbytes(HOST) == rows.store.used_rows == 0
        fill(rows, 1, 12, [Move(1, 0, 8, DEVICE, HOST)])
        rows.step({1: 1}, [Move(1, 0, 2, HOST, None), Move(1, 8, 10, DEVICE, HOST)])
        assert rows.is_right(1)
        rows.store.release(1)


def test_a_row_that_was_prefetched_for_a_sequence_that_is_gone_is_nobody_elses():
    rows = Rows(12)
    fill(rows, 0, 6, [Move(0, 0, 4, DEVICE, HOST)])
    fill(rows, 1, 4)
    rows.step({0: 1})
    rows.prefetch({0: [0, 1, 7]})
    rows.store.release(0)
    rows.step({1: 5}, prefill=True)  # takes all slots that the other had
    rows.step({1: 1}, [Move(1, 0, 9, DEVICE, HOST)])
    rows.store.traffic()
    rows.select({1: [*range(10)]})
    traffic = rows.store.traffic()
    assert (traffic.lookups, traffic.hits) == (9 * NUM_LAYERS, 9 * NUM_LAYERS)


# --- tiers that fail -------------------------------------------------------------------------------------------------


def worn():
    return WornTier(HostTier(NUM_LAYERS, 32, FORMAT.row_bytes))


def slot_of(rows, req_idx, position):
    return int(rows.store._levels[0].table.find(rows.store._row_ids.of(req_idx, position, position + 1)).item())


@pytest.mark.parametrize("staging_rows", [1, 8])
@pytest.mark.parametrize("num_rows", [8, 24])
def test_a_row_that_cannot_be_read_costs_its_own_sequence_only(num_rows, staging_rows):
    """In one part and in pieces: three req_indices share the reads."""
    tier = worn()
    rows = Rows(num_rows, [tier], staging_rows=staging_rows)
    for req_idx in range(3):
        fill(rows, req_idx, 6, [Move(req_idx, 0, 5, DEVICE, HOST)])
    tier.bad.add((1, slot_of(rows, 1, 3)))
    rows.step({0: 1, 1: 1, 2: 1})
    chosen = {req_idx: [0, 3, 4, 6] for req_idx in range(3)}
    assert rows.select(chosen) >= {0, 2}
    assert rows.store.failed() == {1: "Input/output error"}
    assert rows.store.failed() == {}
    rows.store.release(1)
    rows.store.check()
    assert rows.is_right(0)
    assert rows.is_right(2)
    tier.bad.clear()
    rows.store.open(1, 32)
    rows.step({1: 6}, [Move(1, 0, 5, DEVICE, HOST)], prefill=True)
    assert rows.is_right(1)
    assert rows.store.failed() == {}


def test_a_row_that_cannot_be_written_past_the_device_costs_its_own_sequence_only():
    tier = worn()
    rows = Rows(4, [tier])
    for req_idx in range(3):
        rows.store.open(req_idx, 32)
    tier.bad.add((0, 5))
    moves = [Move(req_idx, 0, 4, DEVICE, HOST) for req_idx in range(3)]
    rows.step({0: 5, 1: 5, 2: 5}, moves, prefill=True)
    req_idx = owner_of(rows.store, rows.store._levels[0].table, 5)
    rows.store.drain()
    assert rows.store.failed() == {req_idx: "Input/output error"}
    rows.store.release(req_idx)
    assert all(rows.is_right(other) for other in range(3) if other != req_idx)


def test_a_row_that_cannot_be_pushed_down_costs_its_own_sequence_only():
    tier = worn()
    rows = Rows(12, [tier])
    fill(rows, 0, 5)
    fill(rows, 1, 5)
    tier.bad.add((1, 2))
    rows.step({0: 1, 1: 1}, [Move(0, 0, 4, DEVICE, HOST), Move(1, 0, 4, DEVICE, HOST)])
    rows.store.drain()
    assert rows.store.failed() == {0: "Input/output error"}
    rows.store.release(0)
    rows.store.check()
    assert rows.is_right(1)


def test_a_failure_is_forgotten_with_the_sequence_that_had_it():
    tier = worn()
    rows = Rows(8, [tier], late=True)
    tier.bad.add((0, 0))
    fill(rows, 0, 6)
    rows.step({0: 1}, [Move(0, 0, 4, DEVICE, HOST)])
    rows.store.release(0)
    assert rows.store.failed() == {}


@pytest.mark.parametrize("size", [0, 5 * FORMAT.row_bytes, 5 * FORMAT.row_bytes + 7])
def test_a_truncated_tier_file_fails_the_sequences_whose_rows_are_gone(size, tmp_path):
    tier = DiskTier(tmp_path, NUM_LAYERS, 32, FORMAT.row_bytes)
    rows = Rows(8, [tier])
    fill(rows, 0, 5, [Move(0, 0, 4, DEVICE, DISK)])
    fill(rows, 1, 5, [Move(1, 0, 4, DEVICE, DISK)])
    rows.store.drain()
    os.ftruncate(tier._file, size)
    rows.step({0: 1, 1: 1})
    right = rows.select({0: [0, 1, 5], 1: [0, 1, 5]}, layers=[0])
    failed = rows.store.failed()
    assert right | set(failed) == {0, 1}
    assert set(failed) == ({0, 1} if size == 0 else {1})
    row_bytes = FORMAT.row_bytes
    for message in failed.values():
        assert message.startswith("the tier file gave ")
        assert message.endswith(f" of {2 * row_bytes} bytes")
    for req_idx in (0, 1):
        rows.store.release(req_idx)
    rows.store.check()
    rows.store.close()


def test_a_write_that_the_system_cuts_short_fails_its_sequence(tmp_path, monkeypatch):
    rows = Rows(8, [DiskTier(tmp_path, NUM_LAYERS, 32, FORMAT.row_bytes)])
    fill(rows, 0, 5)
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: 10)
    rows.step({0: 1}, [Move(0, 0, 4, DEVICE, DISK)])
    rows.store.drain()
    assert rows.store.failed() == {0: f"the tier file took 10 of {4 * FORMAT.row_bytes} bytes"}


def test_a_disk_that_fills_up_costs_the_sequences_that_need_more_of_it(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    step_bytes = 4 * NUM_LAYERS * FORMAT.row_bytes
    rows = Rows(24, [DiskTier(tmp_path, NUM_LAYERS, 32, FORMAT.row_bytes, step_bytes=step_bytes)])
    for req_idx in range(3):
        fill(rows, req_idx, 5)
    rows.step({0: 1}, [Move(0, 0, 4, DEVICE, DISK)])
    rows.store.drain()
    monkeypatch.setattr(os, "posix_fallocate", full)
    rows.step({1: 1}, [Move(1, 0, 3, DEVICE, DISK)])
    rows.store.drain()
    assert rows.store.failed() == {1: "No space left on device"}
    rows.store.release(1)
    monkeypatch.undo()
    rows.step({2: 1}, [Move(2, 0, 4, DEVICE, DISK)])
    fill(rows, 1, 5, [Move(1, 0, 4, DEVICE, DISK)])
    rows.store.drain()
    assert rows.store.failed() == {}
    assert all(rows.is_right(req_idx) for req_idx in range(3))
    rows.store.close()


# --- what is counted -------------------------------------------------------------------------------------------------


def test_rows_fetched_ahead_are_no_hits_and_rows_kept_are():
    rows = Rows(8)
    fill(rows, 0, 6, [Move(0, 0, 4, DEVICE, HOST)])
    rows.store.traffic()
    rows.step({0: 1})
    rows.select({0: [0, 1, 6]})
    first = rows.store.traffic()
    assert (first.lookups, first.hits, first.fetched_rows) == (2 * NUM_LAYERS, 0, 2 * NUM_LAYERS)
    rows.prefetch({0: [0, 2, 7]})
    ahead = rows.store.traffic()
    assert (ahead.lookups, ahead.hits, ahead.fetched_rows) == (0, 0, NUM_LAYERS)
    rows.step({0: 1})
    rows.select({0: [0, 2, 7]})
    second = rows.store.traffic()
    assert (second.lookups, second.hits, second.fetched_rows) == (2 * NUM_LAYERS, NUM_LAYERS, 0)
    rows.step({0: 1}, [Move(0, 4, 8, DEVICE, HOST)])
    rows.select({0: [0, 2, 8]})
    third = rows.store.traffic()
    assert (third.lookups, third.hits, third.fetched_rows) == (2 * NUM_LAYERS, 2 * NUM_LAYERS, 0)
    assert third.stored_rows == 4 * NUM_LAYERS


def test_a_wrong_guess_is_no_miss():
    rows = Rows(8)
    fill(rows, 0, 6, [Move(0, 0, 4, DEVICE, HOST)])
    rows.step({0: 1})
    rows.select({0: [0, 6]})
    rows.prefetch({0: [1, 2, 7]})
    rows.store.traffic()
    rows.step({0: 1})
    rows.select({0: [0, 7]})
    traffic = rows.store.traffic()
    assert (traffic.lookups, traffic.hits) == (NUM_LAYERS, NUM_LAYERS)


def test_too_many_rows_for_a_tier_are_refused_with_the_numbers():
    rows = Rows(8, [HostTier(NUM_LAYERS, 2, FORMAT.row_bytes)])
    fill(rows, 0, 6)
    with pytest.raises(CapacityError, match="4 tokens of req_idx 0 are to go to a tier that has room for 2"):
        rows.step({0: 1}, [Move(0, 0, 4, DEVICE, HOST)])
