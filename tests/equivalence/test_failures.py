"""Disks that fail under a running batch: the requests concerned end with what they have, all others do not notice."""

import os
import re
import threading
from dataclasses import fields

import pytest
import torch

from alisa import LLM, SamplingParams
from alisa.attention import kv_cache as memory
from alisa.cache.offload.tiers import DiskTier
from alisa.errors import CapacityError
from alisa.outputs import RequestOutput
from tests.caps import device_cap
from tests.kv_cases import WornTier

PROMPT_LENGTHS = (3, 41, 17, 60, 33, 25)
NEW_TOKENS = 40
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture
def disks(monkeypatch):
    """The disk tiers of the runs of a test, in the order in which they were made."""
    made = []

    def make(*args):
        made.append(WornTier(DiskTier(*args)))
        return made[-1]

    monkeypatch.setattr(memory, "DiskTier", make)
    return made


def prompts_for(llm):
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, llm.spec.vocab_size, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def small(directory, policy="swa", tokens=100, **options):
    """A model with device memory for so many tokens: 100 are a quarter of all."""
    options |= {"policy": policy, "sparsity": 0.6, "dtype": "float32", "max_num_seqs": 6, "max_model_len": 128}
    cap = device_cap(LLM(directory, **options), tokens)
    return LLM(directory, kv_device_memory=cap, **options)


def run(llm, on_event=lambda number, event: None):
    """Outputs in order; `on_event` sees every event as it comes."""
    outputs = []
    for number, event in enumerate(llm.stream(prompts_for(llm), [PARAMS] * len(PROMPT_LENGTHS))):
        on_event(number, event)
        if isinstance(event, RequestOutput):
            outputs.append(event)
    return sorted(outputs, key=lambda output: output.index)


def assert_sound(outputs, expected):
    """Errors end a request with a beginning of what it would have said; the others say all of it."""
    for output, tokens in zip(outputs, expected, strict=True):
        if output.finish_reason == "error":
            assert output.error
            assert output.token_ids == tokens[: len(output.token_ids)]
            assert len(output.token_ids) < NEW_TOKENS
        else:
            assert (output.finish_reason, output.token_ids, output.error) == ("length", tokens, "")
        report = output.report
        times = [getattr(report, field.name) for field in fields(report) if field.name.endswith("_s")]
        assert all(0 <= seconds < 300 for seconds in times), report


@pytest.mark.parametrize("policy", ["dense", "swa", "sketch"])
def test_a_read_that_fails_ends_one_request_and_harms_no_other(policy, tiny_model, disks):
    llm = small(tiny_model("opt"), policy)
    expected = [output.token_ids for output in run(llm)]
    outcomes = []

    def on_event(number, event):
        if number == 60:
            disks[-1].bad |= {(layer, slot) for layer in range(3) for slot in range(0, 400, 2)}
            disks[-1].write = disks[-1].tier.write  # what was written before stays unreadable, new rows are fine
        if isinstance(event, RequestOutput):
            outcomes.append(event.finish_reason)
            if event.finish_reason == "error":
                disks[-1].bad.clear()

    outputs = run(llm, on_event)
    assert_sound(outputs, expected)
    assert "error" in outcomes
    assert any(output.finish_reason == "error" and output.token_ids for output in outputs)
    assert next(output.error for output in outputs if output.error) == "Input/output error"
    assert [output.token_ids for output in run(llm)] == expected, "the next run has a disk of its own"


def test_a_row_that_is_bad_from_the_start_costs_only_its_owners(tiny_model, monkeypatch):
    """With a small cap rows of prompts go straight down; a request may end before its first token."""
    llm = small(tiny_model("opt"), "dense")
    expected = [output.token_ids for output in run(llm)]
    errors = 0
    for bad in (0, 7, 30, 90, 200):

        def make(*args, bad=bad):
            tier = WornTier(DiskTier(*args))
            tier.bad.add((1, bad))
            return tier

        monkeypatch.setattr(memory, "DiskTier", make)
        outputs = run(llm)
        assert_sound(outputs, expected)
        errors += sum(output.finish_reason == "error" for output in outputs)
    assert errors > 0


def test_a_write_that_fails_while_prompts_are_read_ends_requests_without_a_token(tiny_model, monkeypatch):
    def make(*args):
        tier = WornTier(DiskTier(*args))
        tier.bad |= {(2, slot) for slot in range(0, 40)}
        return tier

    directory = tiny_model("opt")
    llm = small(directory, "dense", tokens=24, prefill_chunk=32)
    expected = [output.token_ids for output in run(llm)]
    monkeypatch.setattr(memory, "DiskTier", make)
    outputs = run(llm)
    assert_sound(outputs, expected)
    assert any(output.finish_reason == "error" and not output.token_ids for output in outputs)


def test_a_truncated_tier_file_ends_requests_with_a_clear_message(tiny_model, disks):
    llm = small(tiny_model("llama-gqa-tied"), "dense")
    expected = [output.token_ids for output in run(llm)]

    def on_event(number, event):
        if number == 50:
            os.ftruncate(disks[-1].tier._file, 20_000)

    outputs = run(llm, on_event)
    assert_sound(outputs, expected)
    errors = [output.error for output in outputs if output.finish_reason == "error"]
    assert errors
    assert all(re.fullmatch(r"the tier file (gave|was cut to) \d+ of \d+ bytes", error) for error in errors)


def test_nothing_is_left_of_a_run_however_it_ends(tiny_model, tmp_path):
    llm = small(tiny_model("opt"), kv_disk_path=tmp_path)
    before, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    run(llm)
    stream = llm.stream(prompts_for(llm), PARAMS)
    next(stream)
    stream.close()  # interrupted
    llm.stream(prompts_for(llm), PARAMS)  # never begun
    with (
        small(tiny_model("opt"), kv_disk_path=tmp_path, kv_disk_memory=20_000) as short,
        pytest.raises(CapacityError, match="raise --kv-device-memory or --kv-disk-memory, or lower --max-tokens"),
    ):
        short.generate([list(range(3, 63))], SamplingParams(max_tokens=68))
    assert set(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []
    assert not any(thread.name.startswith("alisa-kv") for thread in set(threading.enumerate()) - threads)
