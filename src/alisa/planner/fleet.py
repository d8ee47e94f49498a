"""A job on many machines: hours and bytes for each number of replicas, and what would have to grow first.

One machine is priced by its profile (`alisa.planner.plan`); here are the parts that do not grow with the machines: the
driver, which reads the prompts, hands shards out and merges results, and the disk that all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from alisa.errors import InputError

SHARD_SIZE = 256
"""As `alisa generate --ray` cuts."""

SHARDS_AT_ONCE = 2
"""Of a replica: at the end of a job the last replica works on so many, and the others on nothing."""

PROMPT_BYTES_PER_TOKEN = 4.5
"""Text of a token in JSON."""

RESULT_BYTES = 350
"""Counts and times of a result, in addition to its prompt and its tokens."""

RESULT_BYTES_PER_TOKEN = 10.5
"""Text and id of a token. With the short words and ids of the embedded model 128 tokens make 1.4 kB in all."""


@dataclass(frozen=True, slots=True)
class DriverCosts:
    """Seconds of one core (benchmarks/fleet.py: a Xeon with AVX-512, Ray 2.60, python 3.11)."""

    read_prompt_s: float = 5.4e-5
    """A line is read, checked and counted."""
    dispatch_s: float = 1.6e-3
    """A shard is handed out and its answer taken, with 16 replicas on 2 cores; 0.7 ms with 2."""
    merge_result_s: float = 2.2e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRequest:
    """What is to be planned."""

    num_prompts: int
    prompt_len: int
    output_len: int
    prompts_per_s: float
    """Of one replica."""
    weight_bytes: int
    """That each replica reads from the shared disk when it starts."""
    storage_bandwidth: float
    """Bytes that the shared disk gives or takes in a second, all machines together."""
    costs: DriverCosts = DriverCosts()


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """A job on a number of replicas. Seconds follow each other in this order."""

    replicas: int
    read_s: float
    """The driver reads and checks the prompts."""
    load_s: float
    """The weights come from the shared disk to all replicas."""
    work_s: float
    tail_s: float
    """The last shards are still running, and replicas have nothing to do: half of what they take."""
    merge_s: float
    input_bytes: int
    output_bytes: int
    driver_share: float
    """Of the time of work in which the driver hands shards out; above 1 replicas wait for it."""
    storage_share: float
    """Of what the shared disk takes that results fill while replicas work."""
    store_bytes: int
    """Of shards on the way in the object store, on the driver's machine."""
    bottleneck: str
    """The part that takes most in addition to the work, where it is more than a tenth of that."""

    @property
    def seconds(self) -> float:
        """From the command to the last byte."""
        return self.read_s + self.load_s + self.work_s + self.tail_s + self.merge_s

    @property
    def efficiency(self) -> float:
        """Share of the machine hours in which replicas work."""
        return self.work_s / self.seconds

    @property
    def replica_hours(self) -> float:
        """What is paid for."""
        return self.replicas * self.seconds / 3600


def plan_fleet(request: FleetRequest, replicas: int) -> FleetPlan:
    """The job on this many replicas."""
    costs, num_prompts = request.costs, request.num_prompts
    num_shards = math.ceil(num_prompts / SHARD_SIZE)
    input_bytes = int(num_prompts * request.prompt_len * PROMPT_BYTES_PER_TOKEN)
    output_bytes = int(num_prompts * (RESULT_BYTES + request.output_len * RESULT_BYTES_PER_TOKEN) + input_bytes)
    compute_s = num_prompts / (request.prompts_per_s * replicas)
    dispatch_s = num_shards * costs.dispatch_s
    write_s = output_bytes / request.storage_bandwidth
    work_s = max(compute_s, dispatch_s, write_s)
    parts = {
        "reading prompts": num_prompts * costs.read_prompt_s,
        "loading weights": replicas * request.weight_bytes / request.storage_bandwidth,
        "the last shards": SHARD_SIZE * SHARDS_AT_ONCE / request.prompts_per_s / 2 if num_shards > replicas else 0.0,
        # Read and written once more, by one process.
        "merging results": num_prompts * costs.merge_result_s + 2 * write_s,
    }
    read_s, load_s, tail_s, merge_s = parts.values()
    parts |= {"handing shards out": dispatch_s, "writing results": write_s}
    worst = max(parts, key=lambda name: parts[name])
    return FleetPlan(
        replicas,
        read_s,
        load_s,
        work_s,
        tail_s,
        merge_s,
        input_bytes,
        output_bytes,
        dispatch_s / compute_s,
        write_s / compute_s,
        min(num_shards, replicas * SHARDS_AT_ONCE) * input_bytes * SHARD_SIZE // num_prompts,
        worst if parts[worst] > 0.1 * compute_s else "nothing",
    )


def replicas_for(request: FleetRequest, hours: float) -> int:
    """The fewest replicas that are done in time.

    Raises:
        InputError: no number is.
    """
    fewest = max(1, math.ceil(request.num_prompts / (request.prompts_per_s * hours * 3600)))
    for replicas in _numbers(fewest, 1000 * fewest):
        if plan_fleet(request, replicas).seconds <= hours * 3600:
            return replicas
    best = min(
        (plan_fleet(request, replicas) for replicas in _numbers(1, 1000 * fewest)), key=lambda plan: plan.seconds
    )
    raise InputError(
        f"{hours:g} hours are too few with any number of replicas: {best.replicas:,} are the fastest and take "
        f"{best.seconds / 3600:.1f} hours, {(best.seconds - best.work_s) / 3600:.1f} of them for reading the prompts, "
        "the weights, the last shards and merging. Split the input into several jobs, or allow more."
    )


def _numbers(first: int, last: int) -> Iterator[int]:
    """Each a twentieth above the one before."""
    while first <= last:
        yield first
        first = max(first + 1, first * 21 // 20)


def fleet_record(plan: FleetPlan) -> dict[str, Any]:
    """Plain values, for `--json`."""
    return {
        **asdict(plan),
        "seconds": plan.seconds,
        "efficiency": plan.efficiency,
        "replica_hours": plan.replica_hours,
    }
