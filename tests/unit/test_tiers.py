"""Lower tiers: rows come back, a file that nobody sees, disks that are full or too short."""

import errno
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa.cache.offload.tiers import DiskTier, HostTier
from alisa.errors import CapacityError, InputError
from alisa.kernels.native import library
from alisa.kernels.reference.rows import move_rows
from alisa.outputs import Medium

NUM_LAYERS, NUM_ROWS, ROW_BYTES = 2, 700, 12


def movers():
    """The mover of rows and its native reference, where that was built."""
    return [move_rows, *([library.move_rows] if library.available() else [])]


STEP_ROWS = 150
STEP_BYTES = STEP_ROWS * NUM_LAYERS * ROW_BYTES
"""Of a file that grows in five steps, the last of them shorter."""


@pytest.fixture(params=["host", "disk", "disk-native", "disk-in-steps"])
def tier(request, tmp_path):
    if request.param == "disk-native" and not library.available():
        pytest.skip(library.unavailable_reason())
    if request.param == "host":
        made = HostTier(NUM_LAYERS, NUM_ROWS, ROW_BYTES)
    elif request.param == "disk-in-steps":
        made = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, step_bytes=STEP_BYTES)
    else:
        move = library.move_rows if request.param == "disk-native" else move_rows
        made = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, move)
    yield made
    made.close()


def test_rows_come_back_from_any_slots_to_any_places(tier):
    """Long runs of neighbours, more than one system call takes, and scattered rows; layers do not touch each other."""
    draw = np.random.default_rng(0)
    for count in (0, 1, 7, 600, NUM_ROWS):
        slots = draw.permutation(NUM_ROWS)[:count]
        source = draw.integers(0, 256, (NUM_LAYERS, NUM_ROWS, ROW_BYTES), np.uint8)
        places = draw.permutation(NUM_ROWS)[:count]
        for layer in range(NUM_LAYERS):
            tier.write(layer, slots, source[layer], places)
        for layer in range(NUM_LAYERS):
            some = draw.permutation(count)[: count // 2 + 1]
            target = np.zeros((NUM_ROWS, ROW_BYTES), np.uint8)
            at = draw.permutation(NUM_ROWS)[: len(some)].astype(np.int32)
            tier.read(layer, slots[some], target, at)
            assert np.array_equal(target[at], source[layer, places[some]])
            assert target.sum(dtype=np.int64) == target[at].sum(dtype=np.int64), "other rows were written"


def test_neighbours_go_in_one_call(tmp_path, monkeypatch):
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: (calls.append(args), preadv(*args))[1])
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES)
    tier.write(1, np.array([50]), np.zeros((1, ROW_BYTES), np.uint8), np.zeros(1, np.int64))
    target = np.empty((NUM_ROWS, ROW_BYTES), np.uint8)
    tier.read(1, np.array([12, 10, 11, 50, 30, 31]), target, np.arange(6))
    assert [(len(buffers), offset) for _, buffers, offset in calls] == [
        (count, (NUM_ROWS + first) * ROW_BYTES) for count, first in ((3, 10), (2, 30), (1, 50))
    ]
    tier.close()


def test_the_file_has_no_name_even_while_it_is_open(tmp_path):
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES)
    assert list(tmp_path.iterdir()) == []
    state = os.fstat(tier._file)
    assert state.st_nlink == 0
    assert tier.medium is Medium.DISK
    tier.close()


def write_one(tier, slot, *, layer=0, value=7):
    tier.write(layer, np.array([slot]), np.full((1, ROW_BYTES), value, np.uint8), np.zeros(1, np.int64))


def read_one(tier, slot, *, layer=0):
    target = np.zeros((1, ROW_BYTES), np.uint8)
    tier.read(layer, np.array([slot]), target, np.zeros(1, np.int64))
    return target[0].tolist()


def test_the_file_grows_with_the_slots_that_are_used_and_no_further(tmp_path):
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, step_bytes=STEP_BYTES)
    assert os.fstat(tier._file).st_size == 0
    for slot, steps in ((0, 1), (STEP_ROWS - 1, 1), (STEP_ROWS, 2), (3, 2), (4 * STEP_ROWS - 1, 4)):
        write_one(tier, slot, layer=NUM_LAYERS - 1)
        state = os.fstat(tier._file)
        assert state.st_size == steps * STEP_BYTES
        assert state.st_blocks * 512 >= state.st_size, "its size is claimed, not promised"
    write_one(tier, NUM_ROWS - 1)
    assert os.fstat(tier._file).st_size == NUM_LAYERS * NUM_ROWS * ROW_BYTES
    tier.close()


def test_rows_of_a_layer_lie_together_within_a_step(tmp_path):
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, step_bytes=STEP_BYTES)
    offsets = np.concatenate([tier._offsets(layer, np.arange(NUM_ROWS)) for layer in range(NUM_LAYERS)])
    assert sorted(offsets.tolist()) == list(range(0, NUM_LAYERS * NUM_ROWS * ROW_BYTES, ROW_BYTES)), (
        "no gap, no overlap"
    )
    for layer in range(NUM_LAYERS):
        steps = np.diff(tier._offsets(layer, np.arange(NUM_ROWS)))
        assert (steps > 0).all()
        assert np.count_nonzero(steps != ROW_BYTES) == 4
    tier.close()


def test_a_disk_that_others_have_filled_refuses_new_rows_and_keeps_the_old_ones(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, step_bytes=STEP_BYTES)
    write_one(tier, 3, value=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device"):
            write_one(tier, STEP_ROWS)
        write_one(tier, 4, value=6)
    write_one(tier, STEP_ROWS, value=9)
    assert [read_one(tier, slot) for slot in (3, 4, STEP_ROWS)] == [[value] * ROW_BYTES for value in (5, 6, 9)]
    tier.close()


def test_threads_that_write_at_once_grow_the_file_once(tmp_path):
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES, step_bytes=STEP_BYTES)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(write_one, tier, slot, value=slot % 251) for slot in range(0, NUM_ROWS, 7)]
    for job in jobs:
        job.result()
    assert all(read_one(tier, slot) == [slot % 251] * ROW_BYTES for slot in range(0, NUM_ROWS, 7))
    tier.close()


def open_files():
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_the_file_is_gone_when_the_tier_is_closed_or_forgotten(tmp_path):
    before = open_files()
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES)
    assert open_files() - before
    tier.close()
    tier.close()
    assert open_files() == before
    tier = DiskTier(tmp_path, NUM_LAYERS, NUM_ROWS, ROW_BYTES)
    del tier
    gc.collect()
    assert open_files() == before


def test_a_full_disk_is_found_out_at_once_with_the_numbers(tmp_path):
    before = open_files()
    with pytest.raises(CapacityError) as error:
        DiskTier(tmp_path, 4, 2**40, 2**10)
    assert str(error.value).startswith(f"The disk tier needs 4194304.0 GiB in {tmp_path} and ")
    assert str(error.value).endswith(" are free; lower --kv-disk-memory or use --kv-disk-path.")
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_hold_files_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none cannot hold the disk tier: No such file or directory; use --kv-disk-p"):
        DiskTier(tmp_path / "none", 1, 1, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot hold the disk tier: Not a directory; use --kv-disk-path\."):
        DiskTier(tmp_path / "file", 1, 1, 1)


def test_a_tier_may_be_for_nothing(tmp_path):
    DiskTier(tmp_path, NUM_LAYERS, 0, ROW_BYTES).close()


@pytest.mark.parametrize("move", movers())
def test_a_truncated_file_gives_what_is_left_and_says_how_much(move, tmp_path):
    tier = DiskTier(tmp_path, 1, 10, ROW_BYTES, move)
    tier.write(0, np.arange(10), np.full((10, ROW_BYTES), 7, np.uint8), np.arange(10))
    os.ftruncate(tier._file, 4 * ROW_BYTES + 5)
    target = np.zeros((10, ROW_BYTES), np.uint8)
    tier.read(0, np.arange(4), target, np.arange(4))
    assert (target[:4] == 7).all()
    with pytest.raises(OSError, match="the tier file gave 17 of 36 bytes"):
        tier.read(0, np.array([5, 4, 3]), target, np.arange(3))
    with pytest.raises(OSError, match="the tier file gave 0 of 24 bytes"):
        tier.read(0, np.array([9, 7]), target, np.arange(2))
    with pytest.raises(OSError, match="the tier file was cut to 53 of 120 bytes"):
        tier.write(0, np.array([9]), target, np.arange(1))
    with pytest.raises(OSError, match="the tier file gave 0 of 12 bytes"):
        tier.read(0, np.array([8]), target, np.arange(1))
    tier.close()


@pytest.mark.parametrize("move", movers())
def test_what_the_system_refuses_is_an_os_error(move, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(ROW_BYTES))
    with path.open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        move(
            file.fileno(), np.zeros(1, np.int64), np.zeros((1, ROW_BYTES), np.uint8), np.zeros(1, np.int64), write=True
        )


@pytest.mark.skipif(not library.available(), reason="the native mover was not built")
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.booleans())
@settings(max_examples=30)
def test_both_movers_move_the_same_bytes(tmp_path_factory, seed, share, write):
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 256, (100, ROW_BYTES), np.uint8)
    slots = np.flatnonzero(draw.random(100) < share)
    rows = draw.permutation(100)[: len(slots)]
    found = []
    for move in movers():
        path = tmp_path_factory.getbasetemp() / "mover"
        path.write_bytes(first.tobytes())
        memory = 255 - first
        with path.open("r+b") as file:
            assert move(file.fileno(), slots * ROW_BYTES, memory, rows, write=write) == len(rows) * ROW_BYTES
        found.append((memory.tobytes(), path.read_bytes()))
    assert found[0] == found[1]
