"""A cap covers everything that grows with tokens, and what is not used costs nothing."""

import random

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alisa.cache.capacity import StateMemory, device_capacity, resident_table_bytes
from alisa.cache.codec import FloatCodec
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import HostTier
from alisa.cache.row_ids import BLOCK_TOKENS, RowIds
from alisa.cache.store import KVStore
from alisa.errors import CapacityError
from alisa.machine import free_memory
from alisa.outputs import Medium
from alisa.scheduler.plan import Move, ScheduledChunk
from alisa.spec import RowFormat
from tests.kv_cases import CODEC, FORMAT, hidden_in, layer_inputs, plan_of, project

CPU = torch.device("cpu")
LARGE = FloatCodec(RowFormat("float32", 8, 128))


def tiered(num_rows, tiers, *, num_layers=2, codec=CODEC, max_num_seqs=4, max_length=64, **options):
    return TieredStore(
        num_layers=num_layers,
        codec=codec,
        num_rows=num_rows,
        max_num_seqs=max_num_seqs,
        max_length=max_length,
        tiers=tiers,
        **options,
    )


def append(store, num_layers, chunks, moves=()):
    """New tokens pass through a store; what they hold does not matter."""
    store.begin(plan_of(chunks, moves, prefill=True))
    count = sum(chunk.count for chunk in chunks)
    for layer in range(num_layers):
        k = torch.zeros(count, FORMAT.num_kv_heads, FORMAT.head_dim)
        store.append(layer, k, k, torch.zeros(count, 4))


@given(
    st.integers(2_000, 200_000),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(2, 200),
    st.integers(0, 500),
    st.randoms(use_true_random=False),
)
@example(1_000_000, 5, 1, 6000, 4000, random.Random(0))
@settings(max_examples=60, deadline=None)
def test_whatever_lies_in_a_tiered_store_its_parts_stay_under_the_cap(
    num_bytes, num_layers, max_num_seqs, max_length, wanted, draw
):
    capacity = device_capacity(
        num_bytes,
        num_layers=num_layers,
        row_bytes=FORMAT.row_bytes,
        max_num_seqs=max_num_seqs,
        max_length=max_length,
        lower_tokens=wanted,
        num_tiers=1,
        piece_columns=4,
        holds_tables=True,
    )
    assert capacity.lower_tokens <= wanted
    if capacity.num_rows < 1:
        return
    pool_bytes = capacity.num_rows * num_layers * FORMAT.row_bytes
    staging_bytes = capacity.staging_rows * FORMAT.row_bytes
    assert pool_bytes + staging_bytes + capacity.in_flight_bytes + capacity.table_bytes <= num_bytes
    tier = HostTier(num_layers, capacity.lower_tokens, FORMAT.row_bytes)
    store = tiered(
        capacity.num_rows,
        [tier],
        num_layers=num_layers,
        max_num_seqs=max_num_seqs,
        max_length=max_length,
        staging_rows=capacity.staging_rows,
        piece_columns=4,
        in_flight_bytes=capacity.in_flight_bytes,
    )
    for _ in range(2):  # what was used and given back takes room, too
        for req_idx in range(max_num_seqs):
            store.open(req_idx, max_length)
        for req_idx in draw.sample(range(max_num_seqs), max_num_seqs):
            room = capacity.num_rows - sum(store.length(other) - store.bounds(other)[0] for other in store._open)
            room_below = capacity.lower_tokens - sum(store.bounds(other)[0] for other in store._open)
            while store.length(req_idx) < min(max_length, room + room_below) and room:
                start, bound = store.length(req_idx), store.bounds(req_idx)[0]
                end = draw.randint(start + 1, min(max_length, room + room_below))
                lower = min(max(end - room, bound), room_below)
                moves = [Move(req_idx, bound, lower, Medium.DEVICE, Medium.HOST)] if lower > bound else []
                append(store, num_layers, [ScheduledChunk(req_idx, start, end - start)], moves)
                assert store.table_bytes <= capacity.table_bytes
                assert store.nbytes(Medium.DEVICE) <= pool_bytes
        store.check()
        for req_idx in range(max_num_seqs):
            store.release(req_idx)
        assert store.table_bytes <= capacity.table_bytes
    store.close()


@given(num_rows=st.integers(1, 300), max_num_seqs=st.integers(1, 6), max_length=st.integers(1, 200), seed=st.randoms())
@settings(max_examples=30, deadline=None)
def test_the_tables_of_a_store_without_tiers_stay_under_their_bound(num_rows, max_num_seqs, max_length, seed):
    store = KVStore(
        num_layers=1, codec=CODEC, num_rows=num_rows, max_num_seqs=max_num_seqs, max_length=max_length, device=CPU
    )
    for req_idx in range(max_num_seqs):
        store.open(req_idx, max_length)
    for req_idx in range(max_num_seqs):
        while count := min(num_rows - store.used_rows, max_length - store.length(req_idx), seed.randint(1, 50)):
            append(store, 1, [ScheduledChunk(req_idx, store.length(req_idx), count)])
            assert store.table_bytes <= resident_table_bytes(num_rows, max_num_seqs, max_length)


def test_where_tables_lie_elsewhere_they_take_nothing_of_the_cap():
    options = {
        "num_layers": 4,
        "row_bytes": 100,
        "max_num_seqs": 8,
        "max_length": 1000,
        "num_tiers": 1,
        "piece_columns": 64,
    }
    there = device_capacity(100_000, lower_tokens=5000, holds_tables=False, **options)
    here = device_capacity(100_000, lower_tokens=5000, holds_tables=True, **options)
    assert there.table_bytes == 0
    assert there.lower_tokens == 5000
    assert there.num_rows > here.num_rows
    assert here.lower_tokens < 5000, "tables for all of them would take more than a quarter of the cap"


@pytest.mark.parametrize(
    ("num_bytes", "knows_all"), [(5_000_000, (True, True)), (1_150_000, (False, True)), (600_000, (False, False))]
)
def test_where_none_waits_for_another_the_state_has_room_for_all_where_it_can(num_bytes, knows_all):
    options = {"num_layers": 2, "row_bytes": 256, "max_num_seqs": 4, "max_length": 1024, "num_tiers": 1}
    for wants_all, expected in zip((False, True), knows_all, strict=True):
        state = StateMemory(token_bytes=200, read_share=0.2, wants_all=wants_all)
        capacity = device_capacity(
            num_bytes, lower_tokens=4096, piece_columns=4, holds_tables=True, state=state, **options
        )
        assert capacity.num_rows > 0
        assert (capacity.state_tokens == 4 * 1024) == expected


@pytest.mark.parametrize("kind", ["tiered", "resident"])
def test_a_large_cap_costs_nothing_until_it_is_used(kind):
    num_rows = free_memory() // 2 // (4 * LARGE.format.row_bytes)
    sizes = {"num_layers": 4, "codec": LARGE, "num_rows": num_rows, "max_num_seqs": 256, "max_length": 1 << 20}
    before = psutil.Process().memory_info().rss
    if kind == "tiered":
        store = TieredStore(tiers=[HostTier(4, num_rows, LARGE.format.row_bytes)], **sizes)
    else:
        store = KVStore(device=CPU, **sizes)
    store.open(0, 1 << 20)
    store.begin(plan_of([ScheduledChunk(0, 0, 8)]))
    grown = psutil.Process().memory_info().rss - before
    assert grown < 64 << 20
    assert store.table_bytes < 1 << 20
    store.close()


@pytest.mark.parametrize("kind", ["tiered", "resident"])
def test_a_pool_larger_than_the_machine_is_refused_with_the_numbers(kind):
    sizes = {"num_layers": 1 << 10, "codec": LARGE, "num_rows": 1 << 20, "max_num_seqs": 1, "max_length": 1 << 20}
    with pytest.raises(CapacityError) as error:
        TieredStore(tiers=[], **sizes) if kind == "tiered" else KVStore(device=CPU, **sizes)
    assert str(error.value).startswith("A KV pool of 8192.0 GiB is asked for and this machine has ")
    assert str(error.value).endswith(" GiB of memory; lower --kv-device-memory.")


@pytest.mark.parametrize("in_flight_bytes", [0, 300, 5000])
def test_rows_that_are_written_behind_take_no_more_than_they_may(in_flight_bytes):
    hidden_tier = HostTier(2, 400, 16)
    store = tiered(
        8,
        [HostTier(2, 400, FORMAT.row_bytes)],
        max_length=400,
        hidden=hidden_in(hidden_tier),
        rebuildable=30,
        in_flight_bytes=in_flight_bytes,
    )
    store.open(0, 400)
    while (start := store.length(0)) < 320:
        store.begin(plan_of([ScheduledChunk(0, start, 40)], [Move(0, start, start + 39, Medium.DEVICE, Medium.HOST)]))
        hidden, positions = layer_inputs(start, 40), torch.arange(start, start + 40)
        for layer in range(2):
            store.append(layer, *project(layer, hidden, positions), hidden)
            assert store._in_flight._write_bytes <= in_flight_bytes // 2
        if start:
            k, _ = store.read(1, 0, 0, start)
            assert torch.equal(k, project(1, layer_inputs(0, start), torch.arange(start))[0])
    store.close()


def test_row_ids_are_of_tokens_that_exist_and_are_used_again():
    ids = RowIds(max_num_seqs=3, max_length=100)
    ids.extend(0, 20)
    ids.extend(1, 1)
    ids.extend(0, 50)
    ids.check()
    numbers = [*ids.of(0, 0, 50).tolist(), *ids.of(1, 0, 1).tolist()]
    assert len(set(numbers)) == 51
    assert max(numbers) < ids.capacity <= 2 * (51 + 2 * BLOCK_TOKENS)
    assert ids.positions(ids.of(0, 0, 50)).tolist() == list(range(50))
    assert ids.of(0, 17, 35).tolist() == numbers[17:35]
    capacity = ids.capacity
    ids.release(0)
    ids.extend(2, 50)
    ids.check()
    assert ids.capacity == capacity
    assert ids.of(1, 0, 1).tolist() == numbers[50:]
    assert not set(ids.of(2, 0, 50).tolist()) & {numbers[50]}
