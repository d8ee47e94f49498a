"""Who is on the device and who leaves it: slots, protection, and both orders of leaving."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.cache.offload.residency import EVICTIONS, Residency
from alisa.cache.row_ids import NOWHERE, RowIds

NUM_LAYERS, NUM_LANES, MAX_LENGTH = 2, 3, 50


def residency(num_slots=6, eviction="lru", num_layers=NUM_LAYERS, max_length=MAX_LENGTH):
    """A map in which all positions of all sequences have row ids."""
    row_ids = RowIds(NUM_LANES, max_length)
    for req_idx in range(NUM_LANES):
        row_ids.extend(req_idx, max_length)
    made = Residency(num_layers, num_slots, row_ids, eviction)
    made.reserve(row_ids.capacity)
    return made


def ids_of(map_, positions, req_idx=0):
    return map_._row_ids.lookup(np.full(len(positions), req_idx), np.array(positions, np.int64))


def place(map_, positions, *, layer=0, req_idx=0, **options):
    return map_.place(layer, ids_of(map_, positions, req_idx), **options)


def touch(map_, positions, *, layer=0, req_idx=0, ahead=False):
    map_.touch(layer, map_.slots[layer][ids_of(map_, positions, req_idx)], ahead=ahead)


def make_safe(map_, length, req_idx=0):
    """Positions below this are safe below."""
    map_.safe[ids_of(map_, range(length), req_idx)] = True


def present(map_, layer=0, req_idx=0):
    return np.flatnonzero(map_.slots[layer][ids_of(map_, range(MAX_LENGTH), req_idx)] != NOWHERE).tolist()


def test_placed_rows_have_slots_of_their_own_in_their_layer():
    map_ = residency()
    slots = place(map_, [4, 7, 9])
    assert len(set(slots.tolist())) == 3
    assert map_.slots[0][ids_of(map_, [4, 7, 9])].tolist() == slots.tolist()
    assert present(map_) == [4, 7, 9]
    assert present(map_, layer=1) == []
    assert map_.num_resident == 3
    map_.check()


def test_rows_without_a_copy_below_never_leave():
    map_ = residency()
    place(map_, range(6))
    map_.tick()
    map_.tick()
    assert place(map_, [10]) is None
    assert place(map_, [10], at_any_cost=True) is None
    make_safe(map_, 2)
    assert place(map_, [10, 11, 12], at_any_cost=True) is None
    assert present(map_) == list(range(6)), "nothing has changed"
    assert place(map_, [10, 11]) is not None
    assert present(map_) == [2, 3, 4, 5, 10, 11]
    map_.check()


def test_rows_of_this_step_stay_unless_nothing_else_helps():
    map_ = residency()
    make_safe(map_, 6)
    place(map_, range(6))
    map_.tick()
    touch(map_, [0, 1, 2, 3])
    assert place(map_, [10, 11, 12]) is None
    assert place(map_, [10, 11]) is not None
    assert present(map_) == [0, 1, 2, 3, 10, 11]
    assert place(map_, [12], at_any_cost=True) is not None
    assert len(present(map_)) == 6
    map_.check()


def test_rows_for_the_next_step_stay_through_it():
    map_ = residency()
    make_safe(map_, 20)
    place(map_, range(3))
    place(map_, [10, 11], ahead=True)
    touch(map_, [2], ahead=True)
    map_.tick()
    assert place(map_, [20, 21, 22, 23]) is None
    assert place(map_, [20, 21, 22]) is not None
    assert present(map_) == [2, 10, 11, 20, 21, 22]
    map_.tick()
    assert place(map_, [30, 31, 32]) is not None, "and no longer"
    assert present(map_) == [20, 21, 22, 30, 31, 32]


def test_the_row_that_was_not_read_for_longest_leaves_first():
    map_ = residency(eviction="lru")
    make_safe(map_, 6)
    place(map_, range(6))
    for step in ([0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 3, 4, 5], [0, 3, 4], [0, 4], [4]):
        map_.tick()
        touch(map_, step)
    map_.tick()
    for position, gone in ((10, 2), (11, 1), (12, 5), (13, 3), (14, 0)):
        place(map_, [position])
        assert gone not in present(map_)
        map_.check()
    assert present(map_) == [4, 10, 11, 12, 13, 14]


def test_the_oldest_token_leaves_first():
    map_ = residency(eviction="age")
    for req_idx in range(NUM_LANES):
        make_safe(map_, 40, req_idx)
    place(map_, [30, 8, 20])
    place(map_, [25, 5, 10], req_idx=1)
    map_.tick()
    touch(map_, [8])  # that it is read makes no difference once the step is over
    map_.tick()
    for position, (req_idx, gone) in ((41, (1, 5)), (42, (0, 8)), (43, (1, 10)), (44, (0, 20)), (45, (1, 25))):
        place(map_, [position], req_idx=2)
        assert gone not in present(map_, req_idx=req_idx)
    assert present(map_) == [30]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_large_cache_makes_room_for_several_at_once(eviction):
    map_ = residency(320, eviction, num_layers=1, max_length=1000)
    make_safe(map_, 320)
    place(map_, range(320))
    map_.tick()
    place(map_, [500])
    assert map_.num_resident == 320 - 10 + 1, "one slot in 32"
    map_.check()


def test_a_released_req_idx_leaves_nothing_behind():
    map_ = residency()
    place(map_, [0, 1, 2], req_idx=1)
    place(map_, [0], req_idx=2)
    make_safe(map_, 3, req_idx=1)
    map_.release(ids_of(map_, range(3), 1))
    assert present(map_, req_idx=1) == []
    assert present(map_, req_idx=2) == [0]
    assert not map_.safe.any()
    map_.check()


@given(
    st.sampled_from(EVICTIONS),
    st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 12)), max_size=20),
)
def test_slots_are_never_lost_or_shared(eviction, steps):
    map_ = residency(eviction=eviction)
    length = safe_below = 0
    for count, ahead, at_any_cost, safe in steps:
        map_.tick()
        safe_below = max(safe_below, min(safe, length))
        make_safe(map_, safe_below)
        before = present(map_)
        new = list(range(length, min(length + count, MAX_LENGTH)))
        placed = place(map_, new, ahead=ahead, at_any_cost=at_any_cost)
        map_.check()
        if placed is None:
            assert present(map_) == before
        else:
            length += len(new)
            gone = set(before) - set(present(map_))
            assert all(position < safe_below for position in gone)


def test_check_notices_a_lost_slot():
    map_ = residency()
    place(map_, [1])
    map_._first_unused[0] += 1
    with pytest.raises(AssertionError, match="lost"):
        map_.check()
