"""Rows on their way to and from a GPU, with streams of their own: only a real device can get their order wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alisa.cache.offload.tiers import HostTier
from alisa.cache.offload.transfer import CopyStream, DeviceBuffer, HostBuffer, Transfers, transfer_buffers
from alisa.config import EngineConfig
from alisa.engine.builder import CacheOptions
from alisa.lab.bench.session import RunSpec, batch_config, device_cap_for, run_batch
from alisa.lab.bench.shapes import SHAPES
from alisa.model.loader import random_decoder

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU], id="cuda")]
on_each_device = pytest.mark.parametrize("device", DEVICES)
ROWS, ROW_BYTES = 4096, 8192


def buffer_of(rows):
    return DeviceBuffer(rows, CopyStream(rows.device))


def busy(rows, value):
    """A long piece of the model's work on the current stream, at whose end all rows hold `value`."""
    if rows.is_cuda:
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
    rows.fill_(value)


@on_each_device
def test_what_is_given_is_what_the_model_had_written_before(device):
    rows = torch.zeros(ROWS, ROW_BYTES, dtype=torch.uint8, device=device)
    buffer, tier, transfers = buffer_of(rows), HostTier(1, ROWS, ROW_BYTES), Transfers()
    indices = np.arange(0, ROWS, 2)
    busy(rows, 7)
    fence = buffer.fence()
    handle = transfers.start(
        lambda subset: buffer.give(
            lambda source, at: tier.write(0, indices[subset], source, at), indices[subset], fence
        ),
        np.zeros(len(indices), np.int64),
    )
    transfers.wait(handle)
    found = np.zeros((len(indices), ROW_BYTES), np.uint8)
    tier.read(0, indices, found, np.arange(len(indices)))
    assert (found == 7).all()
    transfers.close()


@on_each_device
def test_what_is_received_does_not_reach_rows_that_are_still_being_read(device):
    rows = torch.ones(ROWS, ROW_BYTES, dtype=torch.uint8, device=device)
    buffer, transfers = buffer_of(rows), Transfers()
    indices = np.random.default_rng(0).permutation(ROWS)[:1000]
    if rows.is_cuda:
        torch.cuda._sleep(50_000_000)
    before = rows.clone()  # the model reads; a row that came too early would show here
    fence = buffer.fence()

    def read(target, at):
        target[at] = (indices % 251)[:, None]

    transfers.wait(transfers.start(lambda subset: buffer.receive(read, indices, fence), np.zeros(1, np.int64)))
    after = rows.cpu().numpy()  # in the order of the model's work, without waiting for the device
    assert (before.cpu() == 1).all()
    assert (after[indices] == (indices % 251)[:, None]).all()
    others = np.setdiff1d(np.arange(ROWS), indices)
    assert (after[others] == 1).all()
    transfers.close()


@on_each_device
def test_rows_that_are_put_are_there_for_the_next_kernel(device):
    rows = torch.zeros(64, 16, dtype=torch.uint8, device=device)
    buffer = buffer_of(rows)
    buffer.put(np.array([3, 5]), torch.full((2, 16), 9, dtype=torch.uint8))
    assert rows.sum(dim=1).cpu().tolist() == [144 if row in (3, 5) else 0 for row in range(64)]


@on_each_device
def test_a_device_gets_the_buffer_that_it_needs(device):
    rows = torch.zeros(2, 4, 16, dtype=torch.uint8, device=device)
    kinds = {type(buffer) for buffer in transfer_buffers(rows)}
    assert kinds == {HostBuffer if device == "cpu" else DeviceBuffer}


@on_each_device
@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_in_main_memory_give_the_same_tokens(device, policy, dtype):
    spec = replace(SHAPES["llama-tiny"], num_layers=3)
    decoder = random_decoder(spec, torch.float32, torch.device(device))
    generator = np.random.default_rng(1)
    prompts = [generator.integers(10, spec.vocab_size, length).tolist() for length in (90, 31, 64)]
    lengths = [len(ids) for ids in prompts]
    config = EngineConfig(policy=policy, sparsity=0.6, kv_dtype=dtype, max_num_seqs=3, kv_disk_memory=0)
    need = sum(lengths) + 3 * 39

    def tokens(share):
        spec = RunSpec(config, CacheOptions(host_bytes=0 if share == 1 else 1 << 22))
        cap = device_cap_for(decoder, replace(spec, config=batch_config(config, lengths, 40)), int(share * need))
        ran = run_batch(decoder, replace(spec, config=replace(config, kv_device_memory=cap)), prompts, 40)
        assert (ran.details()["host_peak_bytes"] > 0) == (share < 1)
        return ran.outputs

    assert tokens(0.6) == tokens(1)
