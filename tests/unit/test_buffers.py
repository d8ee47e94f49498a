"""The way of rows to memory that only copies reach, on a device that has no streams: same tokens, row for row."""

from functools import partial

import pytest

from alisa import LLM, SamplingParams
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.transfer import CopyStream, DeviceBuffer
from alisa.engine import builder as memory


def staged(rows):
    stream = CopyStream(rows.device)
    return tuple(DeviceBuffer(each, stream) for each in rows)


@pytest.mark.parametrize("policy", ["swa", "dense"])
def test_rows_that_pass_through_buffers_give_the_same_tokens(policy, monkeypatch):
    prompts = [list(range(3, 3 + length)) for length in (40, 9, 25)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = LLM(policy=policy, sparsity=0.6)
    expected = [output.token_ids for output in plain.generate(prompts, params)]
    monkeypatch.setattr(memory, "TieredStore", partial(TieredStore, make_buffers=staged))
    capped = LLM(policy=policy, sparsity=0.6, kv_device_memory=40 * plain.describe()["kv_token_bytes"])
    assert [output.token_ids for output in capped.generate(prompts, params)] == expected
    assert capped.summary().traffic.fetched_rows > 0
