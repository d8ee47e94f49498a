"""Orders of the waiting queue, simulated: requests come at random, the engine's own scheduler decides, a clock counts.

    python benchmarks/queue_orders.py --prompts alpaca.json --record benchmarks/results/queue_orders.jsonl

Prompts and the lengths of their outputs come from a JSON list of {"instruction", "input", "output"}; `heavy` spreads
the lengths further (times a log-normal number, sigma 1). What a step takes is a model, not a measurement: `--step`
seconds and `--each` for every sequence, `--token` for every prompt token. Capacity is the rate at which a full batch
of average requests is served. Arrivals are Poisson, or come in bursts: the times between them are gamma with shape
1/4, so that they vary twice as much (`--burstiness 0.25` of `vllm bench serve`). Normalised latency is a request's
time by its output tokens. `oracle` is hrrn with the true lengths, `sjf` the shortest true length first. Every order
meets the same arrivals.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, quantiles

from recording import tell

from alisa.config import SamplingParams
from alisa.engine.loaded import embedded_model
from alisa.lab.bench.stamp import current_stamp
from alisa.model.stored import open_model
from alisa.policy.registry import reads_of
from alisa.scheduler.order import FirstCome, HighestResponseRatio, QueueOrder
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import Limits
from alisa.scheduler.plan import StepPlan
from alisa.scheduler.request import Request
from alisa.scheduler.scheduler import Scheduler
from alisa.scheduler.simulate import IntegerCache

ORDERS = ("fcfs", "hrrn", "oracle", "sjf")
TRAFFIC = ("alpaca", "heavy")
ARRIVALS = {"poisson": 1.0, "bursts": 0.25}
"""Shape of the gamma distribution of the times between two requests; 1 is the exponential one of Poisson."""
MOST_TOKENS = 4096


@dataclass
class StepModel:
    """Seconds that things take, and the clock that they are added to."""

    step_s: float
    each_s: float
    token_s: float
    now_s: float = 0.0

    def run_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """See `RunCosts`."""
        return prompt_tokens * self.token_s + output_tokens * self.step_s

    def spend(self, plan: StepPlan) -> None:
        """The clock goes on by what a step takes."""
        if plan.prefill:
            self.now_s += self.token_s * plan.num_tokens
        else:
            self.now_s += self.step_s + self.each_s * len(plan.chunks)


class ShortestFirst:
    """The shortest true length."""

    def choose(self, waiting: Sequence[Request]) -> Request:
        """See `QueueOrder`."""
        return min(waiting, key=lambda request: request.max_new_tokens)

    def learn(self, request: Request) -> None:
        """It knows."""


class KeepsRows:
    """Nobody has to make room here."""

    def keeps_rows(self, request: Request) -> bool:
        """See `RestoreCosts`."""
        return True


def make_order(name: str, model: StepModel) -> QueueOrder:
    """The order of this name; `oracle` is hrrn on requests that are known to go on to their end."""
    if name == "fcfs":
        return FirstCome()
    if name == "sjf":
        return ShortestFirst()
    return HighestResponseRatio(model, now=lambda: model.now_s)


def simulate(
    name: str,
    work: Sequence[tuple[list[int], int]],
    rate: float,
    shape: float,
    model: StepModel,
    max_num_seqs: int,
    rng: random.Random,
) -> list[Request]:
    """Every request after it has ended; times are those of the clock.

    Args:
        name: of the order.
        work: prompt and output tokens of every request.
        rate: arrivals in a second.
        shape: of their gamma distribution.
        model: prices steps.
        max_num_seqs: requests that run together.
        rng: draws the arrivals.
    """
    order = make_order(name, model)
    scheduler = Scheduler(
        Limits(1 << 30),
        AllDevice(),
        reads_of("dense", 0.0),
        KeepsRows(),
        max_num_seqs=max_num_seqs,
        prefill_chunk=1024,
        order=order,
    )
    cache = IntegerCache(Limits(1 << 30))
    coming = []
    at = 0.0
    for index, (prompt, length) in enumerate(work):
        at += rng.gammavariate(shape, 1 / (rate * shape))
        most = length if name in ("oracle", "sjf") else MOST_TOKENS
        params = SamplingParams(max_tokens=most, ignore_eos=name == "oracle")
        coming.append((Request(str(index), prompt, params, most, arrival_s=at), length))
    lengths = {request.request_id: length for request, length in coming}
    ended: list[Request] = []
    while len(ended) < len(work):
        if not scheduler.has_requests:
            model.now_s = max(model.now_s, coming[0][0].arrival_s)
        while coming and coming[0][0].arrival_s <= model.now_s:
            scheduler.add(coming.pop(0)[0])
        plan = scheduler.schedule(cache)
        if plan is None:
            continue
        cache.begin(plan)
        model.spend(plan)
        running = {request.req_idx: request for request in scheduler.running}
        finished = []
        for chunk in plan.chunks:
            request = running[chunk.req_idx]
            if chunk.end == len(request.token_ids):
                request.first_token_s = request.first_token_s or model.now_s
                request.append(0)
                if len(request.output_ids) == lengths[request.request_id]:
                    request.finish_reason = "eos"
                    finished.append(request)
        scheduler.update(plan, finished, {})
        for request in finished:
            assert request.req_idx is not None
            cache.close(request.req_idx)
            request.finished_s = model.now_s
            ended.append(request)
    return ended


def figures(requests: Sequence[Request]) -> dict[str, float]:
    """What a user feels."""
    normalised = [(r.finished_s - r.arrival_s) / len(r.output_ids) for r in requests]
    latency = [r.finished_s - r.arrival_s for r in requests]
    first = [r.first_token_s - r.arrival_s for r in requests]
    return {
        "normalised_s": round(mean(normalised), 4),
        "normalised_p50_s": round(quantiles(normalised, n=100)[49], 4),
        "normalised_p99_s": round(quantiles(normalised, n=100)[98], 4),
        "latency_s": round(mean(latency), 2),
        "latency_p99_s": round(quantiles(latency, n=100)[98], 2),
        "first_token_s": round(mean(first), 2),
        "longest_wait_s": round(max(first), 2),
    }


def main() -> None:
    """Every order at every load, with several seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6])
    parser.add_argument("--arrivals", nargs="+", choices=ARRIVALS, default=list(ARRIVALS))
    parser.add_argument("--traffic", nargs="+", choices=TRAFFIC, default=TRAFFIC)
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--step", type=float, default=0.100)
    parser.add_argument("--each", type=float, default=0.0027)
    parser.add_argument("--token", type=float, default=0.0037)
    parser.add_argument("--record", type=Path, help="append the record to this file")
    args = parser.parse_args()
    tokenizer = open_model(embedded_model()).tokenizer()
    rows = json.loads(args.prompts.read_text())
    prompts = [tokenizer.encode("\n".join(filter(None, (row["instruction"], row.get("input"))))) for row in rows]
    outputs = [len(tokenizer.encode(row["output"])) for row in rows]
    for traffic, arrivals in product(args.traffic, args.arrivals):
        results = []
        for load, order in product(args.load, args.order):
            found = []
            for seed in range(args.seeds):
                rng = random.Random(seed)
                work = [
                    (
                        prompt,
                        min(max(round(n * (rng.lognormvariate(0, 1) if traffic == "heavy" else 1)), 1), MOST_TOKENS),
                    )
                    for prompt, n in zip(prompts, outputs, strict=True)
                ]
                rng.shuffle(work)
                model = StepModel(args.step, args.each, args.token)
                batch = args.max_num_seqs
                decode_s = mean(n for _, n in work) * (args.step / batch + args.each)
                capacity = 1 / (decode_s + mean(len(prompt) for prompt, _ in work) * args.token)
                found.append(figures(simulate(order, work, load * capacity, ARRIVALS[arrivals], model, batch, rng)))
            result = {name: round(mean(each[name] for each in found), 4) for name in found[0]}
            results.append({"load": load, "order": order, **result})
            print(f"{traffic:7} {arrivals:7} load {load:.1f} {order:7} {result}", flush=True)
        record = {
            "benchmark": "queue_orders",
            **{name: value for name, value in vars(args).items() if name != "record"},
            "prompts": args.prompts.name,
            "traffic": traffic,
            "arrivals": arrivals,
            "num_requests": len(rows),
            "stamp": asdict(current_stamp()),
            "results": results,
        }
        tell(record, args.record)


if __name__ == "__main__":
    main()
