"""What a fleet costs: one replica against no fleet, and what the driver does for each prompt, shard and result.

`overhead`: the same job by `alisa generate` and by `--ray local --replicas 1`. What a job of one prompt takes, which is the
start, is taken off both, so that what is left is the price of shards, Ray and merging.
`driver`: reading and checking a prompt, handing a shard to replicas that do nothing, and merging a result. Planning a
fleet is done with these (alisa.planner.fleet).

    python benchmarks/fleet.py overhead --record benchmarks/results/fleet.jsonl
    python benchmarks/fleet.py driver --record benchmarks/results/fleet.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from recording import tell

from alisa.cli.merge import merge_shards
from alisa.cli.shards import cut_input
from alisa.dist.cluster import ReplicaSize, connect, disconnect
from alisa.dist.fleet import Fleet
from alisa.dist.replica import Progress, ShardCount
from alisa.dist.share import ReplicaShare
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp

WORDS = "the old ship was at sea and a storm came up in the night while captain men sailed home".split()
SHARD = 256


def write_prompts(path: Path, num_prompts: int) -> None:
    """Prompts of 4 to 40 words."""
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(num_prompts):
            text = " ".join(draw.choices(WORDS, k=draw.randint(4, 40)))
            file.write(json.dumps({"id": f"p{index}", "prompt": text}) + "\n")


def seconds(source: Path, output: Path, max_tokens: int, *options: str) -> float:
    """Wall time of the command."""
    words = ["-m", "alisa", "generate", "--input", str(source), "--output", str(output), "--quiet"]
    started = perf_counter()
    subprocess.run([sys.executable, *words, "--max-tokens", str(max_tokens), *options], check=True)
    return perf_counter() - started


def overhead(num_prompts: int, max_tokens: int) -> dict[str, object]:
    """The job with and without a fleet, each less a job of one prompt."""
    ways = {"plain": (), "ray": ("--ray", "local", "--replicas", "1")}
    found: dict[str, object] = {"num_prompts": num_prompts, "max_tokens": max_tokens}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for size in (1, num_prompts):
            write_prompts(directory / f"{size}.jsonl", size)
        for way, options in ways.items():
            start, whole = (
                seconds(directory / f"{size}.jsonl", directory / f"{way}-{size}", max_tokens, *options)
                for size in (1, num_prompts)
            )
            found |= {f"{way}_start_s": round(start, 2), f"{way}_s": round(whole - start, 2)}
        plain = _tokens(directory / f"plain-{num_prompts}")
        found["same_tokens"] = plain == _tokens(directory / f"ray-{num_prompts}" / "results.jsonl")
    found["overhead"] = round(float(str(found["ray_s"])) / float(str(found["plain_s"])) - 1, 4)
    return found


def _tokens(path: Path) -> dict[int, list[int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["index"]: record["token_ids"] for record in records}


@dataclass(frozen=True)
class Nothing:
    """Work that is done at once."""

    def open(self, share: ReplicaShare, progress: Progress) -> Nothing:
        """There is no model."""
        return self

    def run(self, task: object) -> ShardCount:
        """There is nothing to do."""
        return ShardCount(SHARD)


class Shards:
    """Shards of the size of real ones, all of them innocent."""

    def task(self, number: int) -> object:
        """What travels."""
        return b"x" * (SHARD * 200)

    def is_suspect(self, number: int) -> bool:
        """Never."""
        return False

    def died(self, number: int) -> None:
        """Never."""

    def done(self, number: int, count: ShardCount) -> None:
        """Nothing to remember."""


class Silent:
    """Nobody listens."""

    def progress(self, reports: object, num_ready: int) -> None:
        """Nothing."""

    def told(self, message: str) -> None:
        """Nothing."""


def dispatch(num_replicas: int, num_shards: int) -> float:
    """Seconds of the driver for one shard."""
    size = ReplicaSize(num_replicas, ReplicaShare(0, 0, 0))
    with Fleet(Nothing(), size, Silent()) as fleet:
        fleet.run(Shards(), range(num_replicas * 2))  # all are there
        started = perf_counter()
        fleet.run(Shards(), range(num_shards))
        return (perf_counter() - started) / num_shards


def driver(num_prompts: int, num_shards: int) -> dict[str, object]:
    """Seconds of each part of the driver's work."""
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name) / "in.jsonl", Path(name) / "out.jsonl"
        write_prompts(source, num_prompts)
        started = perf_counter()
        prompts = cut_input(source, shard_size=SHARD, n=1, limit=None, keep_invalid=False)
        read_s = perf_counter() - started
        some, whole = Path(name) / "some.jsonl", 0
        write_prompts(some, 64)
        seconds(some, output, 128)
        lines = output.read_bytes().splitlines(keepends=True)
        whole = sum(map(len, lines)) / len(lines)
        results = []
        for shard in prompts.shards:
            path = Path(name) / f"{shard.number}.jsonl"
            with path.open("wb") as file:
                for index in range(shard.first, shard.first + shard.num_prompts):
                    record = json.loads(lines[index % len(lines)]) | {"index": index}
                    file.write(json.dumps(record).encode() + b"\n")
            results.append((shard, path))
        started = perf_counter()
        merge_shards(iter(results), Path(name) / "merged.jsonl")
        merge_s = perf_counter() - started
    connect("local")
    try:
        dispatch_s = {replicas: dispatch(replicas, num_shards) for replicas in (2, 16)}
    finally:
        disconnect()
    return {
        "num_prompts": num_prompts,
        "read_prompt_s": read_s / num_prompts,
        "merge_result_s": merge_s / num_prompts,
        "result_bytes_at_128_tokens": round(whole),
        "dispatch_s": {str(replicas): round(value, 6) for replicas, value in dispatch_s.items()},
    }


def main() -> None:
    """One of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "driver"))
    parser.add_argument("--prompts", type=int, help="default: 2000, for the driver 20000")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    if args.what == "overhead":
        found = overhead(args.prompts or 2000, args.max_tokens)
    else:
        found = driver(args.prompts or 20_000, 2000)
    tell(
        {
            "kind": f"fleet-{args.what}",
            **found,
            "others_cpu_share": round(meter.share(), 3),
            "stamp": asdict(current_stamp()),
        },
        args.record,
    )


if __name__ == "__main__":
    main()
