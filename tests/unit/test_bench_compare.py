"""Floors of a workload: what disturbed the machine for a while must not lower that of another run."""

import pytest

from alisa.lab.bench.compare import series_of, with_best_floors
from alisa.records.schema import Floor
from tests.run_records import run_record


def record(run, gemm_s, bandwidth, *, weight_bytes=1e9, prefill_s=2.0, wall_s=20.0):
    floor = Floor(weight_bytes / bandwidth, 4e9 / bandwidth, gemm_s, prefill_s, bandwidth)
    return run_record(run, wall_s=wall_s, floor=floor)


def test_the_fastest_that_was_seen_prices_every_floor():
    disturbed, quiet = record("a", 90.0, 1e9, prefill_s=9.0), record("b", 9.0, 2e9)
    first, second = (found.floor for found in with_best_floors([disturbed, quiet]))
    assert first == second == quiet.floor
    assert {line.run: line.floor_share for line in series_of([disturbed, quiet])["w"]} == {"a": 13 / 20, "b": 13 / 20}


def test_weights_of_another_format_keep_their_own_products():
    small = record("int8", None, 1e9, weight_bytes=5e8)
    fast = record("b", 9.0, 2e9)
    floor = with_best_floors([small, fast])[0].floor
    assert floor.gemm_s is None
    assert floor.weights_s == pytest.approx(0.25)
    assert floor.decode_s == pytest.approx(0.25 + 2.0)


def test_records_without_a_floor_stay_as_they_are():
    bare = run_record("a", floor=None)
    assert with_best_floors([bare]) == [bare]
