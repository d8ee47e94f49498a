"""Into how many jobs a load is cut follows from how long rows take."""

from time import sleep

import numpy as np
import pytest
import torch

from alisa.cache.codec import make_codec
from alisa.cache.offload.pace import SLOW_ROW_S, SMALL_JOB_ROWS, ReadPace
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.tiers import HostTier
from alisa.cache.offload.transfer import JOB_ROWS
from alisa.outputs import Medium, Phase
from alisa.scheduler.plan import Move, ScheduledChunk, StepPlan
from alisa.spec import RowFormat


def test_rows_that_take_long_come_in_small_jobs_and_fast_ones_in_large():
    pace = ReadPace()
    assert pace.job_rows == JOB_ROWS, "nothing is known"
    for _ in range(100):
        pace.tell(1, 1.0)
    assert pace.job_rows == JOB_ROWS, "one row says nothing"
    for _ in range(100):
        pace.tell(20, 30e-6 * 20)
    assert pace.job_rows == SMALL_JOB_ROWS
    pace.tell(64, 1e-6 * 64)
    assert pace.job_rows == JOB_ROWS


def test_a_thread_that_waited_for_a_processor_says_nothing():
    pace = ReadPace()
    for number in range(200):
        pace.tell(64, 5e-3 if number % 2 else 1e-6 * 64)
        assert pace.job_rows == JOB_ROWS


class RecordedTier(HostTier):
    """Takes its time for each row, and says how many came at once."""

    row_s = 0.0

    def __init__(self, *args):
        super().__init__(*args)
        self.jobs = []

    def read(self, layer, slots, target, target_rows):
        self.jobs.append(len(slots))
        if self.row_s:
            sleep(self.row_s * len(slots))
        super().read(layer, slots, target, target_rows)


@pytest.mark.parametrize(("row_s", "most"), [(0.0, JOB_ROWS), (4 * SLOW_ROW_S, SMALL_JOB_ROWS)])
def test_a_slow_tier_is_asked_for_few_rows_at_a_time(row_s, most):
    length = 100
    codec = make_codec(RowFormat("float32", 1, 2))
    tier = RecordedTier(1, length, codec.format.row_bytes)
    tier.row_s = row_s
    store = TieredStore(num_layers=1, codec=codec, num_rows=length, max_num_seqs=1, max_length=length, tiers=[tier])
    k = torch.arange(length * 2, dtype=torch.float32).view(length, 1, 2)
    try:
        store.open(0, length)
        chunk = ScheduledChunk(0, 0, length)
        store.begin(StepPlan(0, Phase.DEVICE, prefill=True, chunks=(chunk,)))
        store.append(0, k, -k, None)
        move = Move(0, 0, length, Medium.DEVICE, Medium.HOST)
        store.begin(StepPlan(1, Phase.DEVICE_HOST, prefill=False, chunks=(), moves=(move,)))
        store.drain()
        for _ in range(60):  # until the tier is known
            store._loader.load_now(0, np.arange(20), np.zeros(20, np.int64), store._pool[0], np.arange(20))
        tier.jobs.clear()
        ids = store._row_ids.of(0, 0, length)
        store._pool[0].rows.zero_()
        store._loader.load_now(0, ids, np.zeros(length, np.int64), store._pool[0], store._residency.slots[0][ids])
        assert sorted(tier.jobs, reverse=True) == [most] * (length // most) + [length % most]
        found = codec.decode(store._pool[0].rows[torch.from_numpy(store._residency.slots[0][ids]).long()])
        assert torch.equal(found[0], k)
        assert torch.equal(found[1], -k)
    finally:
        store.close()
