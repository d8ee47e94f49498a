"""What the server costs: tokens a second of many streaming clients, of those of the engine alone.

    python benchmarks/server_overhead.py --model FILE --record benchmarks/results/server_overhead.jsonl

One process, one engine and its thread, in turns: clients in a process of their own read the texts of some prompts as
server-sent events (served), an event for each token, and the engine makes the same steps with nobody who reads (alone).
Each prompt joins in the step in which it joined when it was served: calls come one after the other, and what that costs
an engine is not what a server costs. The clients count bytes and parse nothing; what they cost is part of what is
measured, as it is on any machine that has both.

Two figures that other programs change less than a speed: the processor time that a token takes in this process, in
both cases, and the part of it that is the event loop's. And how late the loop is: it asks to be woken in 20 ms, and
what comes in addition is the lag (the timer itself is part of the loop's processor time).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time, thread_time

from real_models import SMOLLM2
from recording import tell

from alisa.config import EngineConfig, SamplingParams
from alisa.engine.engine import Engine
from alisa.engine.output import EngineOutput
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.server.config import ServerConfig
from alisa.server.run import ApiServer, build_service, frozen_heap, serve
from alisa.server.service import Service

LAG_S = 0.02
MODEL_NAME = "served"
EMBEDDED = "embedded"
"""The model inside the package, whose steps are so short that there is little else than the server."""


def prompts(num_clients: int, length: int) -> list[list[int]]:
    """Token ids, all different."""
    return [[5 + (7919 * place + 31 * client) % 1500 for place in range(length)] for client in range(num_clients)]


class JoinWatch:
    """An engine's `step` that counts how many requests take part for the first time in each step."""

    def __init__(self, step: Callable[[], EngineOutput]) -> None:
        self._step = step
        self._seen: set[str] = set()
        self._joins: list[int] = []

    def __call__(self) -> EngineOutput:
        """Make the step."""
        output = self._step()
        if output.record is not None:
            new = set(output.request_ids) - self._seen
            self._seen |= new
            self._joins.append(len(new))
        return output

    def take(self) -> list[int]:
        """Of each step since the last time."""
        joins, self._joins = self._joins, []
        return joins


def alone(engine: Engine, joins: Sequence[int], args: argparse.Namespace) -> float:
    """Called by the engine's thread: the seconds that it takes for all texts, which join in these steps."""
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
    coming = iter(prompts(args.clients, args.prompt_len))
    started = perf_counter()
    for count in joins:
        for prompt in islice(coming, count):
            engine.add_request(prompt, params)
        engine.step()
    if engine.has_requests:
        raise SystemExit("the engine alone needs more steps than the server did; measure again.")
    return perf_counter() - started


async def read_all(address: str, args: argparse.Namespace) -> str:
    """In the clients' process: the seconds until all have read their texts, and those of the processor."""
    host, port = address.removeprefix("http://").split(":")

    async def read(prompt: list[int]) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        fields = {"prompt": prompt, "max_tokens": args.output_len, "ignore_eos": True, "temperature": 0, "stream": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        seen, last = 0, b""
        while b"[DONE]" not in last:
            data = await reader.read(1 << 16)
            if not data:
                raise SystemExit("the server has closed a connection")
            seen += data.count(b'"finish_reason":null')
            last = last[-8:] + data
        if seen != args.output_len:
            raise SystemExit(f"a client has seen {seen} tokens of {args.output_len}")
        writer.close()

    started, cpu_s = perf_counter(), process_time()
    await asyncio.gather(*map(read, prompts(args.clients, args.prompt_len)))
    return f"{perf_counter() - started} {process_time() - cpu_s}"


def be_clients(args: argparse.Namespace) -> None:
    """A line with an address is a round, answered by its seconds."""
    for line in sys.stdin:
        print(asyncio.run(read_all(line.strip(), args)), flush=True)


async def watch_lag(lags: list[float]) -> None:
    """Adds how late the loop was, until it is cancelled."""
    while True:
        due = perf_counter() + LAG_S
        await asyncio.sleep(LAG_S)
        lags.append(perf_counter() - due)


class Clients:
    """The process of those who read."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._address = address

    @classmethod
    async def start(cls, address: str, args: argparse.Namespace) -> Clients:
        """They wait for `read`."""
        sizes = {"--clients": args.clients, "--prompt-len": args.prompt_len, "--output-len": args.output_len}
        words = [str(word) for pair in sizes.items() for word in pair]
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, __file__, "--be-clients", *words]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe), address)

    async def read(self) -> tuple[float, float]:
        """The seconds until all have read their texts, and those of the processor that it took them."""
        self._stdin.write(f"{self._address}\n".encode())
        answer = await self._stdout.readline()
        if not answer:
            raise SystemExit("the clients have ended; what they said stands above.")
        seconds, cpu_s = map(float, answer.split())
        return seconds, cpu_s

    async def close(self) -> None:
        """The process has ended."""
        self._stdin.close()
        await self._process.wait()


def watch_joins(engine: Engine) -> JoinWatch:
    """Called by the engine's thread: its steps are watched from now on."""
    watch = JoinWatch(engine.step)
    engine.step = watch
    return watch


async def measure(service: Service, args: argparse.Namespace) -> tuple[list[dict[str, float]], list[float]]:
    """The figures of each round, and the lags of all of them."""
    address: asyncio.Queue[str] = asyncio.Queue()
    server = ApiServer(service, address.put_nowait)
    serving = asyncio.create_task(serve(server))
    clients = await Clients.start(await address.get(), args)
    engine, num_tokens = service.engine, args.clients * args.output_len
    watch = await engine.between_steps(watch_joins)
    rounds: list[dict[str, float]] = []
    lags: list[float] = []
    for number in range(args.rounds + 1):
        if number == 1:  # the first round is not counted
            rounds.clear()
            lags.clear()
        marks = [process_time()]
        watcher, loop_s = asyncio.create_task(watch_lag(lags)), thread_time()
        served_s, clients_s = await clients.read()
        loop_s = thread_time() - loop_s
        marks.append(process_time())
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        joins = watch.take()
        marks.append(process_time())
        alone_s = await engine.between_steps(partial(alone, joins=joins, args=args))
        marks.append(process_time())
        watch.take()
        rounds.append(
            {
                "alone_tokens_per_s": num_tokens / alone_s,
                "served_tokens_per_s": num_tokens / served_s,
                "alone_cpu_us": 1e6 * (marks[3] - marks[2]) / num_tokens,
                "served_cpu_us": 1e6 * (marks[1] - marks[0]) / num_tokens,
                "loop_cpu_us": 1e6 * loop_s / num_tokens,
                "clients_cpu_us": 1e6 * clients_s / num_tokens,
                "steps": len(joins),
            }
        )
        print(f"  round {number}: " + ", ".join(f"{name} {value:.1f}" for name, value in rounds[-1].items()))
    await clients.close()
    server.should_exit = True
    await serving
    return rounds, lags


def main() -> None:
    """Measure, show, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMOLLM2.path), help="a GGUF file, a directory, or embedded")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    parser.add_argument("--be-clients", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_clients:
        be_clients(args)
        return
    length = args.prompt_len + args.output_len
    # What is known of a prompt would make the second round another one than the first.
    config = EngineConfig(
        model=None if args.model == EMBEDDED else args.model,
        max_num_seqs=args.clients,
        max_model_len=length,
        max_step_tokens=256,
        prefix_cache=False,
    )
    meter = OthersMeter()
    service = build_service(config, ServerConfig(port=0, served_model_name=MODEL_NAME))
    with frozen_heap():  # as `alisa serve` does
        rounds, lags = asyncio.run(measure(service, args))
    hundredths = [1e3 * lag for lag in quantiles(lags, n=100)]
    record = {
        "benchmark": "server_overhead",
        "model": Path(args.model).name,
        "clients": args.clients,
        "prompt_len": args.prompt_len,
        "output_len": args.output_len,
        # Each round against itself, which changes less than the speeds.
        "overhead": 1 - median(found["served_tokens_per_s"] / found["alone_tokens_per_s"] for found in rounds),
        **{name: median(found[name] for found in rounds) for name in rounds[0]},
        "lag_p50_ms": hundredths[49],
        "lag_p99_ms": hundredths[98],
        "lag_max_ms": 1e3 * max(lags),
        "rounds": rounds,
        "others_share": round(meter.share(), 4),
        "stamp": asdict(current_stamp()),
    }
    tell(record, args.record)


if __name__ == "__main__":
    main()
