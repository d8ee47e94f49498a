"""Who is on the device and who leaves it: slots, protection, and both orders of leaving."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alisa.cache.offload.residency import EVICTIONS, NOWHERE, Residency

NUM_LAYERS, NUM_LANES, MAX_LENGTH = 2, 3, 50


def residency(num_slots=6, eviction="lru"):
    return Residency(NUM_LAYERS, num_slots, NUM_LANES, MAX_LENGTH, eviction)


def place(map_, positions, *, layer=0, req_idx=0, **options):
    return map_.place(layer, np.full(len(positions), req_idx), np.array(positions), **options)


def touch(map_, positions, *, layer=0, req_idx=0, ahead=False):
    map_.touch(layer, map_.slots[layer, req_idx, positions], ahead=ahead)


def present(map_, layer=0, req_idx=0):
    return np.flatnonzero(map_.slots[layer, req_idx] != NOWHERE).tolist()


def test_placed_rows_have_slots_of_their_own_in_their_layer():
    map_ = residency()
    slots = place(map_, [4, 7, 9])
    assert len(set(slots.tolist())) == 3
    assert map_.slots[0, 0, [4, 7, 9]].tolist() == slots.tolist()
    assert present(map_) == [4, 7, 9]
    assert present(map_, layer=1) == []
    assert map_.num_resident.tolist() == [3, 0]
    map_.check()


def test_rows_without_a_copy_below_never_leave():
    map_ = residency()
    place(map_, range(6))
    map_.tick()
    map_.tick()
    assert place(map_, [10]) is None
    assert place(map_, [10], at_any_cost=True) is None
    map_.safe[0] = 2
    assert place(map_, [10, 11, 12], at_any_cost=True) is None
    assert present(map_) == list(range(6)), "nothing has changed"
    assert place(map_, [10, 11]) is not None
    assert present(map_) == [2, 3, 4, 5, 10, 11]
    map_.check()


def test_rows_of_this_step_stay_unless_nothing_else_helps():
    map_ = residency()
    map_.safe[0] = 6
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
    map_.safe[0] = 20
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
    map_.safe[0] = 6
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
    map_.safe[:] = 40
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
    map_ = Residency(1, 320, 1, 1000, eviction)
    map_.safe[0] = 320
    place(map_, range(320))
    map_.tick()
    place(map_, [500])
    assert map_.num_resident.tolist() == [320 - 10 + 1], "one slot in 32"
    map_.check()


def test_a_released_req_idx_leaves_nothing_behind():
    map_ = residency()
    place(map_, [0, 1, 2], req_idx=1)
    place(map_, [0], req_idx=2)
    map_.safe[1] = 3
    map_.release(1, 3)
    assert present(map_, req_idx=1) == []
    assert present(map_, req_idx=2) == [0]
    assert map_.safe.tolist() == [0, 0, 0]
    map_.check()


@given(
    st.sampled_from(EVICTIONS),
    st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 12)), max_size=20),
)
def test_slots_are_never_lost_or_shared(eviction, steps):
    map_ = residency(eviction=eviction)
    length = 0
    for count, ahead, at_any_cost, safe in steps:
        map_.tick()
        map_.safe[0] = max(map_.safe[0], min(safe, length))
        before = present(map_)
        new = list(range(length, min(length + count, MAX_LENGTH)))
        placed = place(map_, new, ahead=ahead, at_any_cost=at_any_cost)
        map_.check()
        if placed is None:
            assert present(map_) == before
        else:
            length += len(new)
            gone = set(before) - set(present(map_))
            assert all(position < map_.safe[0] for position in gone)


def test_check_notices_a_lost_slot():
    map_ = residency()
    place(map_, [1])
    map_._num_free[0] -= 1
    with pytest.raises(AssertionError, match="lost"):
        map_.check()
