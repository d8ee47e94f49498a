"""Several callers of one LLM: they share one engine and its caps, and get what each would get alone."""

import gc
import threading

import pytest

from alisa import LLM, SamplingParams
from alisa.errors import InputError, PromptError
from alisa.outputs import RequestOutput, TextDelta

PROMPTS = [[7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24, 25, 26], [30, 31]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(dtype="float32", kv_device_memory="4MiB", max_num_seqs=4, max_model_len=128) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(llm):
    return [llm.generate([prompt], PARAMS)[0].token_ids for prompt in PROMPTS]


def tokens_of(events):
    outputs = sorted((e for e in events if isinstance(e, RequestOutput)), key=lambda output: output.index)
    return [output.token_ids for output in outputs]


def test_two_half_read_streams_share_an_engine(llm, alone):
    first, second = llm.stream(PROMPTS[:2], PARAMS), llm.stream(PROMPTS[2:], PARAMS)
    events = ([], [])
    open_streams = [(first, events[0]), (second, events[1])]
    while open_streams:
        for stream, seen in open_streams:
            event = next(stream, None)
            seen.append(event) if event is not None else open_streams.remove((stream, seen))
    assert tokens_of(events[0]) == alone[:2]
    assert tokens_of(events[1]) == alone[2:]
    for stream in (first, second):
        summary = stream.report().summary
        assert summary.num_requests == 2
        assert summary.output_tokens == 24
        assert summary.kv_peak_bytes <= summary.kv_cap_bytes


def test_threads_get_what_each_would_get_alone(llm, alone):
    found = {}

    def run(index):
        found[index] = [llm.generate([PROMPTS[index]], PARAMS)[0].token_ids for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == {index: [alone[index]] * 3 for index in range(4)}


def test_a_stream_that_is_dropped_half_way_gives_everything_back(llm, alone):
    stream = llm.stream(PROMPTS, PARAMS)
    next(stream)
    engine = llm._engine
    assert not engine.is_idle
    del stream
    gc.collect()
    assert engine.is_idle
    assert engine._engine._session.cache.store.used_rows == 0
    assert tokens_of(llm.stream(PROMPTS, PARAMS)) == alone


def test_a_closed_stream_has_no_more_events_and_a_report_up_to_there(llm):
    with llm.stream(PROMPTS[:1], PARAMS) as stream:
        event = next(stream)
        assert isinstance(event, TextDelta)
    assert next(stream, None) is None
    assert 0 < stream.report().summary.output_tokens < 12


def test_a_bad_prompt_queues_none_of_them(llm):
    with pytest.raises(PromptError, match=r"Prompt 2 is empty"):
        llm.stream([PROMPTS[0], []], PARAMS)
    assert llm._engine.is_idle


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [(b"bytes", "of type bytes"), ([1.0, 2.0], "1.0 among its token ids"), ([True], "True among"), (7, "of type int")],
)
def test_what_is_no_prompt_is_named(llm, prompt, problem):
    with pytest.raises(PromptError, match=problem):
        llm.generate([prompt], PARAMS)


def test_one_text_is_one_prompt(llm):
    assert len(llm.generate("one string", PARAMS)) == 1


def test_what_is_closed_says_so():
    llm = LLM(max_num_seqs=2)
    stream = llm.stream(PROMPTS[:1], PARAMS)
    next(stream)
    llm.close()
    with pytest.raises(InputError, match="closed"):
        llm.generate(PROMPTS[:1], PARAMS)
    llm.close()


def test_another_process_is_told_that_threads_do_not_survive_a_fork(llm, monkeypatch):
    llm.generate(PROMPTS[:1], PARAMS)
    monkeypatch.setattr("alisa.engine.engine.os.getpid", lambda: -1)
    with pytest.raises(InputError, match="fork"):
        llm.generate(PROMPTS[:1], PARAMS)
