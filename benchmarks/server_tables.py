"""Blocks on servers: what ours itself costs (docs/server.md), and how it answers beside others (docs/scheduling.md)."""

from __future__ import annotations

from provenance import provenance
from table_blocks import Results, lines, number, table


def overhead(results: Results) -> str:
    """The newest record of each model: the server against its engine alone."""
    # Records without it compare with an engine that got all prompts at once, and so made fewer steps.
    newest = {r["model"]: r for r in lines(results / "server_overhead.jsonl") if "clients_cpu_us" in r}
    if not newest:
        return ""
    heads = [
        "",
        "engine alone",
        "served",
        "overhead",
        "processor time a token",
        "of the event loop",
        "of the clients",
        "its lag, p50",
        "p99",
    ]
    rows = [
        [
            f"`{model}`",
            f"{number(record['alone_tokens_per_s'])} tokens/s",
            f"{number(record['served_tokens_per_s'])} tokens/s",
            f"{number(100 * record['overhead'])} %",
            f"{number(record['served_cpu_us'])} us",
            f"{number(record['loop_cpu_us'])} us",
            f"{number(record['clients_cpu_us'])} us",
            f"{number(record['lag_p50_ms'])} ms",
            f"{number(record['lag_p99_ms'])} ms",
        ]
        for model, record in newest.items()
    ]
    first = next(iter(newest.values()))
    return (
        f"{first['clients']} clients, prompts of {first['prompt_len']} tokens, {first['output_len']} tokens of output, "
        f"{len(first['rounds'])} rounds (`benchmarks/server_overhead.py`):\n\n{table(heads, rows)}"
    )


def serving(results: Results) -> str:
    """The newest record of each server and load."""
    newest = {(r["server"], r["rate"]): r for r in lines(results / "serving.jsonl")}
    if not newest:
        return ""
    heads = ["server", "calls a second", "tokens/s", "seconds a token", "p99", "first token", "p99"]
    rows = [
        [
            server,
            "all at once" if rate is None else number(rate),
            number(record["tokens_per_s"]),
            f"{record['normalised_s']:.3f}",
            f"{record['normalised_p99_s']:.3f}",
            f"{1000 * record['first_token_s']:.0f} ms",
            f"{1000 * record['first_token_p99_s']:.0f} ms",
        ]
        for (server, rate), record in newest.items()
    ]
    first = next(iter(newest.values()))
    return (
        f"{first['calls']} calls of Alpaca's instructions, Poisson arrivals, answers of at most {first['max_tokens']} "
        f"tokens, seeds: {first['seeds']} (`benchmarks/serving.py`):\n\n{table(heads, rows)}\n\n"
        f"{provenance((record['server'], record['stamp']) for record in newest.values())}"
    )
