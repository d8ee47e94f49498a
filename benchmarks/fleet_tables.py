"""Blocks of docs/scaling.md, from the records of `fleet.py`; see `table_blocks.py`."""

from __future__ import annotations

from table_blocks import Record, Results, lines, number, percent, seconds, table


def driver(results: Results) -> str:
    """What the driver does for each prompt, shard and result."""
    record = _newest(results, "driver")
    if record is None:
        return ""
    shards = ", ".join(f"{_small(cost)} with {replicas}" for replicas, cost in record["dispatch_s"].items())
    rows = [
        ["a prompt is read, checked and counted", _small(record["read_prompt_s"])],
        ["a shard is handed out and its answer taken, by the number of replicas", shards],
        ["a result is merged", _small(record["merge_result_s"])],
    ]
    return (
        f"{table(['the driver', 'one core'], rows)}\n\n`python benchmarks/fleet.py driver`, "
        f"{record['num_prompts']} prompts, {_where(record)}."
    )


def overhead(results: Results) -> str:
    """One replica under Ray against no Ray."""
    record = _newest(results, "overhead")
    if record is None:
        return ""
    rows = [
        [
            name,
            seconds(record[f"{way}_start_s"]),
            seconds(record[f"{way}_s"]),
            number(record.get(f"{way}_tokens_per_s")),
        ]
        for name, way in (("`alisa generate`", "plain"), ("`--ray local --replicas 1`", "ray"))
    ]
    same = "the same tokens" if record["same_tokens"] else "OTHER TOKENS"
    rounds = len(record["rounds"]["ray"]) if "rounds" in record else 1
    return (
        f"{table(['', 'start', 'the rest of the job', 'tokens/s of that'], rows)}\n\n"
        f"`python benchmarks/fleet.py overhead`, {record['num_prompts']} prompts of up to {record['max_tokens']} "
        f"tokens, {same}, {rounds} round(s), {_where(record)}: {100 * record['overhead']:+.1f} % of time."
    )


def saturation(results: Results) -> str:
    """What a fleet is limited by, by the plan."""
    record = _newest(results, "plan")
    if record is None:
        return ""
    rows = [
        [
            _million(int(prompts)),
            f"{answer['replicas']:,}",
            number(answer["seconds"] / 3600),
            percent(answer["efficiency"]),
            percent(answer["driver_share"]),
            percent(answer["storage_share"]),
            f"{answer['store_bytes'] / 1e6:.0f} MB",
            answer["bottleneck"],
        ]
        for prompts, fleet in record["fleets"].items()
        for answer in fleet
    ]
    heads = ["prompts", "replicas", "hours", "of it working", "driver busy", "disk busy", "object store", "limited by"]
    return (
        f"{record['model']} on {record['hardware']}, batch {record['batch']}, {record['prompt_len']} tokens read and "
        f"{record['output_len']} written for each prompt; a shared disk of 1 GB/s:\n\n{table(heads, rows)}"
    )


def _newest(results: Results, kind: str) -> Record | None:
    found = [record for record in lines(results / "fleet.jsonl") if record["kind"] == f"fleet-{kind}"]
    return found[-1] if found else None


def _small(value: float) -> str:
    """Seconds of a thousandth and less."""
    return f"{value * 1e3:.1f} ms" if value >= 1e-4 else f"{value * 1e6:.0f} µs"


def _million(count: int) -> str:
    return f"{count // 10**9} billion" if count >= 10**9 else f"{count // 10**6} million"


def _where(record: Record) -> str:
    stamp = record["stamp"]
    return (
        f"{stamp['num_cpus']:g} cores of {stamp['cpu']}, {stamp['date'][:10]}, all else on the machine took "
        f"{percent(record['others_cpu_share'])} of them"
    )
