"""Blocks of tables for docs/huggingface.md: speed under transformers, and kvpress on the same tasks."""

from __future__ import annotations

import accuracy_tables
import real_tables
from table_blocks import Record, Results, gib, lines, number, percent, seconds, table

_PRESS = "Press"
"""End of the names of kvpress's classes."""


def steps(results: Results) -> str:
    """A model with transformers' cache and with alisa's: a table for the newest record of each workload."""
    newest = {
        (r["model"], r["dtype"], r["batch"], r["prompt_len"], r["output_len"]): r
        for r in lines(results / "huggingface.jsonl")
    }
    parts = []
    for (model, dtype, batch, prompt_len, output_len), record in newest.items():
        found = record["results"]
        base = found["transformers"]["step_s"][1]
        rows = [
            [
                variant,
                seconds(result["prefill_s"][1]),
                f"{number(1e3 * result['step_s'][1])} ms",
                f"{base / result['step_s'][1]:.2f}",
                gib(result["peak_bytes"][1]),
            ]
            for variant, result in found.items()
        ]
        head = ["", "first token", "step", "times as fast", "peak memory"]
        stamp, work = record["stamp"], f"batch {batch}, {prompt_len} + {output_len} tokens"
        parts.append(
            f"`{model}` in {dtype}, {work}, sparsity {record['sparsity']:g}, {stamp['num_threads']} threads of "
            f"{stamp['cpu']}, median of {record['rounds']} rounds:"
        )
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def presses(results: Results) -> str:
    """Presses and alisa's policies: what each loses against dense attention in its own environment."""
    path = results / "accuracy" / "presses_smollm2.jsonl"
    records = accuracy_tables.read([path]) if path.exists() else []
    tasks = list(dict.fromkeys((record["kind"], record["task"]) for record in records))
    cells = {(r["policy"], r["sparsity"], r["task"]): r for r in records}
    variants = sorted(dict.fromkeys((r["sparsity"], r["policy"]) for r in records), key=lambda v: v[0])
    rows = []
    for sparsity, policy in variants:
        of_variant = [cells.get((policy, sparsity, task)) for _, task in tasks]
        shown = accuracy_tables.level if sparsity == 0 else accuracy_tables.cost
        read = next((r["read_share"] for r in of_variant if r is not None and "read_share" in r), None)
        rows.append(
            [
                _name(policy),
                f"{sparsity:g}",
                percent(read),
                *("" if record is None else shown(record) for record in of_variant),
            ]
        )
    head = ["", "sparsity", "read", *(_title(records, kind, task) for kind, task in tasks)]
    if not rows:
        return ""
    return f"`{records[0]['model']}`, {records[0]['stamp']['dtype']}:\n\n{table(head, rows)}"


def _name(policy: str) -> str:
    """Whose it is."""
    if policy == "none":
        return "dense (kvpress's transformers)"
    return f"kvpress {policy.removesuffix(_PRESS)}" if policy.endswith(_PRESS) else f"alisa `{policy}`"


def _title(records: list[Record], kind: str, task: str) -> str:
    """What a column is, and how much of it there is."""
    first = next(r for r in records if (r["kind"], r["task"]) == (kind, task))
    if kind != "ppl":
        return f"{task}, {len(first['units'])} texts"
    settings = first["settings"]
    windows = f"{settings['windows']} x {settings['context']}"
    return f"{real_tables.TEXTS[task]}, {windows}, {settings['prefill']} of them the prompt"
