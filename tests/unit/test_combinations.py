"""What is left to the slow suite is no value, and no pair of values, that nothing else tries."""

from itertools import combinations, product

from tests.combinations import cover


def test_every_value_and_every_pair_is_tried_at_once():
    sizes = (4, 3, 2, 2)
    assert {(axis, case[axis]) for case in cover(sizes, 1) for axis in range(4)} == {
        (axis, value) for axis, size in enumerate(sizes) for value in range(size)
    }
    pairs = cover(sizes, 2)
    for one, other in combinations(range(4), 2):
        assert {(case[one], case[other]) for case in pairs} == set(product(range(sizes[one]), range(sizes[other])))
    assert len(pairs) < 4 * 3 * 2 * 2 / 2
