"""Clients that come, stay, leave and break off, as long as ALISA_SOAK_S says: nothing grows, nobody loses a token."""

import asyncio
import json
import os
import random
import time
from dataclasses import replace

import httpx2
import openai
import psutil
import pytest

from alisa import SamplingParams
from tests.server.conftest import ENGINE, running

SECONDS = float(os.environ.get("ALISA_SOAK_S", "40"))
NUM_CLIENTS = 16
GROWTH_BYTES = 48 << 20
"""What the heap of a process that churns may wander by after its first quarter; a leak of a request's rows would be
gigabytes."""


def jobs():
    draw = random.Random(3)
    return [
        (
            [draw.randrange(3, 2000) for _ in range(draw.randrange(1, 150))],
            SamplingParams(
                max_tokens=draw.randrange(1, 90), temperature=draw.choice([0.0, 1.0]), seed=number, ignore_eos=True
            ),
        )
        for number in range(40)
    ]


async def read_stream(address, body, leaves_after):
    """The text of a stream; None of one that is left after so many events.

    Over a bare connection: what a library's iterators leave behind would be collected in the thread of the server.
    """
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    text, num_events = "", 0
    try:
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
                num_events += 1
                if num_events == leaves_after:
                    return None
            elif line.startswith(b"data: [DONE]"):
                return text
    finally:
        writer.close()
    raise AssertionError("the stream has no end")


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_nothing_grows_and_nobody_loses_a_token(llm):
    todo = jobs()
    expected = [llm.generate([prompt], params)[0].text for prompt, params in todo]
    process = psutil.Process()
    resident, counts = [], {"whole": 0, "left": 0}

    async def client(address, api, number, end):
        draw = random.Random(number)
        while time.monotonic() < end:
            place = draw.randrange(len(todo))
            prompt, params = todo[place]
            streamed = draw.random() < 0.7
            body = {
                "model": "embedded",
                "prompt": prompt,
                "max_tokens": params.max_tokens,
                "temperature": params.temperature,
                "seed": params.seed,
                "ignore_eos": True,
            }
            if not streamed:
                extra = {"ignore_eos": body.pop("ignore_eos")}
                work = asyncio.ensure_future(api.completions.create(**body, extra_body=extra))
                if draw.random() < 0.3:
                    await asyncio.sleep(draw.random() * 0.3)
                    work.cancel()
                    counts["left"] += 1
                    await asyncio.gather(work, return_exceptions=True)
                    continue
                assert (await work).choices[0].text == expected[place]
            else:
                leaves_after = draw.randrange(1, 40) if draw.random() < 0.4 else None
                text = await read_stream(address, {**body, "stream": True}, leaves_after)
                counts["left"] += text is None
                assert text in (None, expected[place])
            counts["whole"] += 1

    async def run(address):
        end = time.monotonic() + SECONDS
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=300) as api:
            tasks = [asyncio.ensure_future(client(address, api, number, end)) for number in range(NUM_CLIENTS)]
            while time.monotonic() < end:
                await asyncio.sleep(SECONDS / 40)
                resident.append(process.memory_info().rss)
            await asyncio.gather(*tasks)

    # Less room than 16 of them want: some are swapped, some lose their rows.
    with running(replace(ENGINE, prefix_cache=True, fair=True, max_step_tokens=64)) as server:
        asyncio.run(run(server.address))
        metrics = httpx2.get(f"{server.address}/metrics").text
        status = httpx2.get(f"{server.address}/state").json()["status"]
    gauges = [
        line for line in metrics.splitlines() if line.startswith(("vllm:num_requests", "vllm:kv_cache", "alisa:kv_d"))
    ]
    assert gauges
    assert all(line.endswith(" 0.0") for line in gauges), gauges
    empty = {"requests": [], "device_bytes": 0, "host_bytes": 0, "disk_bytes": 0, "answer_tokens": 0, "answer": None}
    assert status == empty
    assert counts["whole"] > NUM_CLIENTS
    assert counts["left"] > NUM_CLIENTS
    quarter = len(resident) // 4
    assert max(resident[-quarter:]) - max(resident[:quarter]) < GROWTH_BYTES, resident
