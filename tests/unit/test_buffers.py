"""The way of rows to memory that only copies reach, on a device that has no streams: same tokens, row for row."""

import pytest

from alisa import LLM, SamplingParams
from alisa.attention import kv_cache
from alisa.cache.offload.store import TieredStore
from alisa.cache.offload.transfer import CopyStream, DeviceBuffer
from tests.caps import device_cap


def staged(rows):
    stream = CopyStream(rows.device)
    return tuple(DeviceBuffer(each, stream) for each in rows)


class StagedStore(TieredStore):
    def __init__(self, **arguments):
        super().__init__(make_buffers=staged, **arguments)


@pytest.mark.parametrize("policy", ["swa", "dense"])
def test_rows_that_pass_through_buffers_give_the_same_tokens(policy, monkeypatch):
    prompts = [list(range(3, 3 + length)) for length in (40, 9, 25)]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    sizes = {"policy": policy, "sparsity": 0.6, "max_num_seqs": 3, "max_model_len": 80}
    plain = LLM(**sizes)
    expected = [output.token_ids for output in plain.generate(prompts, params)]
    monkeypatch.setattr(kv_cache, "TieredStore", StagedStore)
    capped = LLM(**sizes, kv_device_memory=device_cap(plain, 90))
    outputs = capped.generate(prompts, params)
    assert [output.token_ids for output in outputs] == expected
    assert outputs.report.summary.traffic.fetched_rows > 0
