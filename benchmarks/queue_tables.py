"""The block of docs/scheduling.md on orders of the waiting queue, from the record of `queue_orders.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from table_blocks import Record, Results, lines, number, table

BOUNDS = (2, 4)
"""Normalised latencies that throughputs are compared at, as multiples of that of the first come at the lowest load."""
TAIL_LOAD = 1.0

Curve = Mapping[float, float]
"""Mean normalised latency by load, both ascending."""


def orders(results: Results) -> str:
    """The newest record of each traffic: latency by load, and what an order lets in at equal latency."""
    newest = {(r["traffic"], r["arrivals"]): r for r in lines(results / "queue_orders.jsonl")}
    if not newest:
        return ""
    record = next(iter(newest.values()))
    names: Sequence[str] = record["order"]
    loads: Sequence[float] = record["load"]
    latency, gains = [], []
    for place, found in newest.items():
        whose, own = ", ".join(place), found["results"]
        curves = {name: {r["load"]: r["normalised_s"] for r in own if r["order"] == name} for name in names}
        latency += [[whose, f"`{name}`", *(number(curves[name][load], 2) for load in loads)] for name in names]
        gains.append([whose, *_gains(curves), *_tails(own, names)])
    others = [name for name in names if name != "fcfs"]
    first = table(["lengths, arrivals", "order", *map(str, loads)], latency)
    second = table(
        [
            "lengths, arrivals",
            *(f"`{name}` at {bound}x" for bound in BOUNDS for name in others),
            *(f"p99 of `{name}`" for name in names),
        ],
        gains,
    )
    return (
        f"Mean seconds for each output token, from arrival to end, by load (1 is capacity); {record['num_requests']} "
        f"requests of {record['prompts']}, {record['max_num_seqs']} at a time, mean of {record['seeds']} seeds "
        f"(`benchmarks/queue_orders.py`, a simulation):\n\n{first}\n\n"
        f"Throughput against `fcfs` where that mean is {' and '.join(map(str, BOUNDS))} times that of `fcfs` at the "
        f"lowest load, and the 99th percentile of a request's time at load {TAIL_LOAD:g}:\n\n{second}"
    )


def _gains(curves: Mapping[str, Curve]) -> list[str]:
    first_come = curves["fcfs"]
    without_queue = first_come[min(first_come)]
    cells = []
    for bound in BOUNDS:
        base = _load_at(first_come, bound * without_queue)
        for name, curve in curves.items():
            if name != "fcfs":
                load = _load_at(curve, bound * without_queue)
                cells.append(_ratio(load, base, max(curve)))
    return cells


def _ratio(load: float | None, base: float | None, most: float) -> str:
    """Of two loads; an order that none of the loads has slowed down as much takes more than the most of them."""
    if base is None:
        return ""
    return f"{load / base:.2f}x" if load is not None else f"above {most / base:.2f}x"


def _tails(own: Sequence[Record], names: Sequence[str]) -> list[str]:
    tails = {r["order"]: r["latency_p99_s"] for r in own if r["load"] == TAIL_LOAD}
    return [f"{number(tails[name], 0)} s" for name in names]


def _load_at(curve: Curve, latency: float) -> float | None:
    """The load that has this latency, on straight lines between those measured; None: none of them has as much."""
    points = list(curve.items())
    for (load, low), (next_load, high) in pairwise(points):
        if low <= latency <= high:
            return load + (next_load - load) * (latency - low) / (high - low)
    return None
