"""The asynchronous engine: hundreds of requests that join, are aborted and finish in random order."""

import asyncio
import random

import pytest

from alisa import LLM, SamplingParams
from alisa.config import EngineConfig
from alisa.engine.async_engine import AsyncEngine, EngineDiedError
from alisa.engine.builder import build_engine
from alisa.engine.loaded import load_model
from alisa.errors import InputError, RequestError
from alisa.outputs import RequestOutput, TextDelta

CONFIG = EngineConfig(dtype="float32", max_num_seqs=6, max_model_len=96, kv_device_memory="2MiB", prefill_chunk=16)
NUM_REQUESTS = 200


@pytest.fixture(scope="module")
def model():
    return load_model(CONFIG)


def requests_of(seed):
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(3, 400) for _ in range(draw.randrange(1, 40))],
            SamplingParams(max_tokens=draw.randrange(1, 12), ignore_eos=True, temperature=draw.choice([0, 1]), seed=i),
        )
        for i in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def alone(model):
    with LLM(config=CONFIG) as llm:
        prompts, params = zip(*requests_of(0), strict=True)
        return [output.token_ids for output in llm.generate(list(prompts), list(params))]


def engine_of(model):
    return AsyncEngine(build_engine(model, CONFIG)[0])


def test_requests_join_are_aborted_and_finish_in_any_order(model, alone):
    draw = random.Random(1)

    async def one(engine, index, prompt, params):
        await asyncio.sleep(draw.random() * 0.5)
        fate = draw.random()
        request_id = await engine.add_request(prompt, params, request_id=f"r{index}")
        tokens = []
        async for event in engine.events(request_id):
            if isinstance(event, TextDelta):
                tokens += event.token_ids
                if fate < 0.2:
                    break  # leaves early
                if fate < 0.4:
                    await engine.abort(request_id)
            else:
                assert event.finish_reason in ("length", "abort")
                assert list(event.token_ids) == tokens
        return tuple(tokens)

    async def run():
        async with engine_of(model) as engine:
            found = await asyncio.gather(
                *(one(engine, i, prompt, params) for i, (prompt, params) in enumerate(requests_of(0)))
            )
            await engine.abort("nobody")  # after every call that was made before
            assert not engine._engine.has_requests
            assert engine._engine._session.cache.store.used_rows == 0
            return found

    found = asyncio.run(run())
    assert all(tokens == whole[: len(tokens)] for tokens, whole in zip(found, alone, strict=True))
    assert sum(tokens == whole for tokens, whole in zip(found, alone, strict=True)) > NUM_REQUESTS // 3


def test_a_cancelled_reader_frees_its_request(model):
    async def run():
        async with engine_of(model) as engine:
            stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=80, ignore_eos=True))
            has_some = asyncio.Event()

            async def read():
                async for _ in stream:
                    has_some.set()

            task = asyncio.create_task(read())
            await has_some.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.abort("nobody")
            return engine._engine.has_requests

    assert not asyncio.run(run())


def test_refusals_reach_the_caller_and_harm_nobody(model):
    async def run():
        async with engine_of(model) as engine:
            with pytest.raises(RequestError, match="empty"):
                await engine.add_request([], SamplingParams())
            name = await engine.add_request([5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
            with pytest.raises(InputError, match="in use"):
                await engine.add_request([5, 6], SamplingParams(), request_id=name)
            outputs = [event async for event in engine.events(name) if isinstance(event, RequestOutput)]
            with pytest.raises(InputError, match="no request"):
                await anext(engine.events(name))
            return outputs

    [output] = asyncio.run(run())
    assert len(output.token_ids) == 2


def test_closing_ends_every_stream(model):
    async def run():
        engine = engine_of(model)
        name = await engine.add_request([5, 6], SamplingParams(max_tokens=90, ignore_eos=True))
        events = engine.events(name)
        await anext(events)
        await engine.close()
        rest = [event async for event in events]
        with pytest.raises(InputError, match="closed"):
            await engine.add_request([5], SamplingParams())
        await engine.close()
        return rest[-1]

    assert asyncio.run(run()).finish_reason == "abort"


def test_an_engine_that_dies_tells_everybody(model, monkeypatch):
    async def run():
        engine = engine_of(model)
        monkeypatch.setattr(engine._engine._runner, "run", lambda *_: 1 / 0)
        name = await engine.add_request([5, 6], SamplingParams())
        with pytest.raises(EngineDiedError, match="division"):
            await anext(engine.events(name))
        with pytest.raises(EngineDiedError, match="division"):
            await engine.add_request([5], SamplingParams())
        await engine.close()

    asyncio.run(run())
