"""Transfers and handles: what waits, what is counted, who fails."""

import threading
from time import sleep

import numpy as np
import pytest

from alisa.cache.offload.transfer import NUM_THREADS, TransferHandle, Transfers


@pytest.fixture
def transfers():
    made = Transfers()
    yield made
    made.close()


def req_indices(*numbers):
    return np.array(numbers, np.int64)


def test_a_handle_is_done_when_its_work_is(transfers):
    go = threading.Event()
    handle = transfers.start(lambda subset: go.wait(10), req_indices(0))
    assert not handle.is_done
    go.set()
    transfers.wait(handle)
    assert handle.is_done
    assert transfers.take_failed() == {}
    assert TransferHandle().is_done


def test_transfers_run_beside_each_other(transfers):
    meet = threading.Barrier(NUM_THREADS)
    handles = [transfers.start(lambda subset: meet.wait(10), req_indices(0)) for _ in range(NUM_THREADS)]
    for handle in handles:
        transfers.wait(handle)  # a BrokenBarrierError if they had not all been there


def test_what_is_not_waited_for_is_hidden(transfers):
    handle = transfers.start(lambda subset: sleep(0.05), req_indices(0))
    while not handle.is_done:
        sleep(0.005)
    transfers.wait(handle)
    assert transfers.busy_s >= 0.05
    assert transfers.wait_s < transfers.busy_s
    waited = transfers.start(lambda subset: sleep(0.05), req_indices(0))
    transfers.wait(waited)
    assert transfers.wait_s > 0.04


def test_what_is_left_to_do_is_done_once_by_the_waiting_thread(transfers):
    threads = []
    handle = transfers.start(lambda subset: threads.append(threading.current_thread()), req_indices(0))
    handle.finish = lambda: threads.append(threading.current_thread())
    transfers.wait(handle)
    transfers.wait(handle)
    assert len(threads) == 2
    assert threads[0].name.startswith("alisa-kv")
    assert threads[1] is threading.current_thread()


def test_work_that_fails_is_repeated_sequence_by_sequence(transfers):
    owners = req_indices(3, 1, 3, 2, 1)
    calls, moved = [], np.zeros(5, bool)

    def work(subset):
        rows = np.arange(5)[subset]
        calls.append(owners[rows].tolist())
        if 3 in rows:  # a row of req_idx 2
            raise OSError(5, "Input/output error")
        moved[rows] = True

    transfers.wait(transfers.start(work, owners))
    assert transfers.take_failed() == {2: "Input/output error"}
    assert transfers.take_failed() == {}
    assert calls == [[3, 1, 3, 2, 1], [1, 1], [2], [3, 3]]
    assert moved.tolist() == [True, True, True, False, True]


def test_work_for_one_sequence_is_tried_once(transfers):
    calls = []

    def work(subset):
        calls.append(subset)
        raise OSError("no number, no name")

    transfers.wait(transfers.start(work, req_indices(4, 4)))
    assert transfers.take_failed() == {4: "no number, no name"}
    assert len(calls) == 1


def test_who_comes_after_a_failed_sequence_has_not_failed(transfers):
    def work(subset):
        raise OSError(5, "Input/output error")

    for req_idx in (1, 2):
        transfers.wait(transfers.start(work, req_indices(req_idx)))
    transfers.forgive(1)
    transfers.forgive(7)
    assert transfers.take_failed() == {2: "Input/output error"}


def test_a_mistake_in_the_work_is_not_taken_for_a_bad_disk(transfers):
    handle = transfers.start(lambda subset: 1 / 0, req_indices(0))
    with pytest.raises(ZeroDivisionError):
        transfers.wait(handle)


def test_no_thread_is_left_after_closing():
    transfers = Transfers()
    for handle in [transfers.start(lambda subset: sleep(0.01), req_indices(0)) for _ in range(4)]:
        transfers.wait(handle)
    assert any(thread.name.startswith("alisa-kv") for thread in threading.enumerate())
    transfers.close()
    assert not any(thread.name.startswith("alisa-kv") for thread in threading.enumerate())
