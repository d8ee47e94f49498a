"""What a fleet costs: one replica against no fleet, what the driver does for each prompt and shard, and a plan.

`overhead`: the same job by `alisa generate` and by `--ray local --replicas 1`, in turns. What a job of one prompt
takes, which is the start, is taken off both, so that what is left is the price of shards, Ray and merging. With the
model inside the package, whose steps are the shortest, that price is at its highest.
`driver`: reading and checking a prompt, handing a shard to replicas that do nothing, and merging a result. Planning a
fleet is done with these (alisa.planner.fleet).
`plan`: what `alisa plan` says of jobs on 10 to 1,000 replicas; nothing is measured.

    python benchmarks/fleet.py overhead --record benchmarks/results/fleet.jsonl
    python benchmarks/fleet.py driver --record benchmarks/results/fleet.jsonl
    python benchmarks/fleet.py plan --record benchmarks/results/fleet.jsonl
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
from statistics import median
from time import perf_counter

from recording import tell

from alisa.cli.merge import merge_shards
from alisa.cli.shards import cut_input
from alisa.dist.cluster import ReplicaSize, cluster
from alisa.dist.fleet import Fleet
from alisa.dist.replica import Progress, ShardCount
from alisa.dist.share import ReplicaShare
from alisa.lab.bench.others import OthersMeter
from alisa.lab.bench.stamp import current_stamp
from alisa.planner.fleet import DriverCosts

WORDS = "the old ship was at sea and a storm came up in the night while captain men sailed home".split()  # noqa: SIM905
SHARD = 256
WAYS = {"plain": (), "ray": ("--ray", "local", "--replicas", "1")}
JOB = ("--batch", "256", "--prompt-len", "200", "--output-len", "200")
PLAN = ("--shape", "llama-7b", "--hardware", "h100-80gb", *JOB)
PLANNED_PROMPTS = (10**7, 10**9)


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


def overhead(num_prompts: int, max_tokens: int, rounds: int) -> dict[str, object]:
    """The job with and without a fleet, each less a job of one prompt: medians of the rounds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    tokens: dict[str, dict[int, list[int]]] = {}
    others: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for size in (1, num_prompts):
            write_prompts(directory / f"{size}.jsonl", size)
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                meter = OthersMeter()
                start, whole = (
                    seconds(directory / f"{size}.jsonl", directory / f"{way}-{size}-{number}", max_tokens, *WAYS[way])
                    for size in (1, num_prompts)
                )
                results = directory / f"{way}-{num_prompts}-{number}"
                tokens[way] = _tokens(results / "results.jsonl" if results.is_dir() else results)
                found[way].append({"start_s": round(start, 2), "seconds": round(whole - start, 2)})
                if way == "plain":  # Ray's replicas are no children of ours
                    others.append(meter.share())
                print(f"  round {number + 1}, {way}: {found[way][-1]}", flush=True)
    num_tokens = sum(map(len, tokens["plain"].values()))
    took = {way: median(run["seconds"] for run in runs) for way, runs in found.items()}
    return {
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        **{f"{way}_start_s": round(median(run["start_s"] for run in runs), 2) for way, runs in found.items()},
        **{f"{way}_s": round(value, 2) for way, value in took.items()},
        **{f"{way}_tokens_per_s": round(num_tokens / value, 1) for way, value in took.items()},
        "overhead": round(took["ray"] / took["plain"] - 1, 4),
        "same_tokens": tokens["plain"] == tokens["ray"],
        "rounds": found,
        "others_cpu_share": round(median(others), 3),
    }


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
        some = Path(name) / "some.jsonl"
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
    with cluster("local"):
        dispatch_s = {replicas: dispatch(replicas, num_shards) for replicas in (2, 16)}
    return {
        "num_prompts": num_prompts,
        "read_prompt_s": read_s / num_prompts,
        "merge_result_s": merge_s / num_prompts,
        "result_bytes_at_128_tokens": round(whole),
        "dispatch_s": {str(replicas): round(value, 6) for replicas, value in dispatch_s.items()},
    }


def plan() -> dict[str, object]:
    """What the planner says of jobs that one machine does not end."""
    fleets, record = {}, {}
    for num_prompts in PLANNED_PROMPTS:
        words = ["-m", "alisa", "plan", *PLAN, "--prompts", str(num_prompts), "--json"]
        run = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        record = json.loads(run.stdout.splitlines()[-1])
        fleets[str(num_prompts)] = record["fleet"][1:]  # from 10 replicas on
    names = ("model", "hardware", "batch", "prompt_len", "output_len", "tokens_per_s")
    return {
        **{name: record[name] for name in names},
        "weight_bytes": record["bytes"]["weights"],
        "costs": asdict(DriverCosts()),
        "fleets": fleets,
    }


def main() -> None:
    """One of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "driver", "plan"))
    parser.add_argument("--prompts", type=int, help="default: 24000, about five minutes; for the driver 20000")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="of the overhead")
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    meter = OthersMeter()
    if args.what == "overhead":
        found = overhead(args.prompts or 24_000, args.max_tokens, args.rounds)
    elif args.what == "driver":
        found = driver(args.prompts or 20_000, 2000)
    else:
        found = plan()
    tell(
        {
            "kind": f"fleet-{args.what}",
            **({} if args.what == "plan" else {"others_cpu_share": round(meter.share(), 3)}),
            **found,
            "stamp": asdict(current_stamp()),
        },
        args.record,
    )


if __name__ == "__main__":
    main()
