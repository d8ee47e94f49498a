"""Servers under load: calls of a chat that come at random, to any server that speaks OpenAI's protocol.

    alisa serve --model SMOLLM2 --served-model-name m --port 8000
    python benchmarks/serving.py --server alisa --url http://127.0.0.1:8000 --prompts alpaca.json --capacity
    python benchmarks/serving.py --server alisa --url http://127.0.0.1:8000 --prompts alpaca.json \
        --rate 4 6 8 --record benchmarks/results/serving.jsonl

    vllm serve DIR --served-model-name m --port 8000 --dtype bfloat16 --max-model-len 2048     # then the same for it

Prompts come from a JSON list of {"instruction", "input"}; each is a chat of its own, answered greedily up to the
model's own end, at most `--max-tokens`. Arrivals are Poisson; `--capacity` sends all calls at once instead. Normalised
latency is the time of a call by the tokens of its answer (of Orca's and vLLM's papers). A seed draws prompts and
arrivals, so that all servers get the same calls at the same times. The clients read bytes and parse only the last
event; they run beside the server, as on any machine that has both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter
from urllib.parse import urlsplit

from recording import tell

from alisa.lab.bench.stamp import current_stamp

USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
DONE = b"[DONE]"


class ServerError(Exception):
    """The server does not do what it is asked to."""


@dataclass(frozen=True)
class Served:
    """A call that has ended. Times in seconds."""

    first_token_s: float
    latency_s: float
    num_tokens: int


async def call(url: str, model: str, prompt: str, max_tokens: int) -> Served:
    """Send a chat, and read its answer to the end.

    Raises:
        ServerError: nobody is there, the server answers with an error, or closes before the end.
    """
    fields = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields).encode()
    address = urlsplit(url)
    started = perf_counter()
    try:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
    except OSError as error:
        raise ServerError(f"no server answers at {url}: {error}") from error
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first_s, end = 0.0, b""
    while DONE not in end:
        data = await reader.read(1 << 16)
        if not data or (not end and b" 200 " not in data[:16]):
            raise ServerError(f"the server says: {data[:300].decode(errors='replace') or 'nothing, and closes'}")
        if not first_s and b'"content"' in data:
            first_s = perf_counter() - started
        end = end[-2000:] + data
    latency_s = perf_counter() - started
    writer.close()
    usage = USAGE.findall(end)
    if not usage:
        raise ServerError("the last event has no usage: no tokens can be counted.")
    return Served(first_s, latency_s, int(usage[-1]))


async def run(args: argparse.Namespace, rate: float | None, seed: int) -> dict[str, float]:
    """The figures of all calls at a rate; None: they come at once."""
    rng = random.Random(seed)
    prompts = rng.sample(args.texts, args.calls)
    at, tasks = 0.0, []
    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            await asyncio.sleep(max(0.0, started + at - perf_counter()))
            tasks.append(group.create_task(call(args.url, args.model_name, prompt, args.max_tokens)))
            at += rng.expovariate(rate) if rate is not None else 0.0
    return figures([task.result() for task in tasks], perf_counter() - started)


def figures(calls: Sequence[Served], wall_s: float) -> dict[str, float]:
    """What users feel, and what the server gives."""
    normalised = [served.latency_s / max(served.num_tokens, 1) for served in calls]
    first = [served.first_token_s for served in calls]
    return {
        "wall_s": round(wall_s, 2),
        "calls_per_s": round(len(calls) / wall_s, 3),
        "tokens_per_s": round(sum(served.num_tokens for served in calls) / wall_s, 1),
        "tokens": round(mean(served.num_tokens for served in calls), 1),
        "normalised_s": round(mean(normalised), 5),
        "normalised_p99_s": round(quantiles(normalised, n=100)[98], 5),
        "first_token_s": round(median(first), 4),
        "first_token_p99_s": round(quantiles(first, n=100)[98], 4),
        "latency_s": round(mean(served.latency_s for served in calls), 3),
    }


def measure(args: argparse.Namespace) -> None:
    """Every rate with every seed; a record for each rate."""
    asyncio.run(run(argparse.Namespace(**{**vars(args), "calls": 8}), None, seed=99))  # what the first calls set up
    for rate in args.rate or [None]:
        rounds = [asyncio.run(run(args, rate, seed)) for seed in range(args.seeds)]
        medians = {name: median(one[name] for one in rounds) for name in rounds[0]}
        settings = {name: getattr(args, name) for name in ("server", "calls", "max_tokens", "seeds")}
        record = {"benchmark": "serving", **settings, "rate": rate, **medians, "rounds": rounds}
        tell({**record, "stamp": asdict(current_stamp())}, args.record)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="what the record calls it")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model-name", default="m")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    loads = parser.add_mutually_exclusive_group(required=True)
    loads.add_argument("--rate", type=float, nargs="+", help="calls a second")
    loads.add_argument("--capacity", action="store_true", help="all calls at once")
    parser.add_argument("--record", type=Path, help="append the records to this file")
    args = parser.parse_args()
    rows = json.loads(args.prompts.read_text(encoding="utf-8"))
    args.texts = ["\n".join(filter(None, (row["instruction"], row.get("input")))) for row in rows]
    try:
        measure(args)
    except* ServerError as errors:
        raise SystemExit(str(errors.exceptions[0])) from errors


if __name__ == "__main__":
    main()
