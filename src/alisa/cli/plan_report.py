"""What a plan says, for a person: a few short tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from alisa.budget import DENSE_TOKENS
from alisa.config import format_bytes

_PARTS = ("linear", "attention", "selection", "transfer", "sampling", "other")


def plan_tables(record: dict[str, Any]) -> Iterator[Table]:
    """The tables, in the order in which one asks."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, text in _lines(record):
        table.add_row(label, Text(text))
    yield table
    if record["fits"]:
        yield _memory(record)
    yield _rates(record)


def _lines(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    num_bytes = record["bytes"]
    yield "model", f"{record['model']} on {record['hardware']}"
    yield "work", f"{record['batch']} prompts of {record['prompt_len']} tokens, {record['output_len']} new tokens each"
    yield (
        "memory",
        f"weights {format_bytes(num_bytes['weights'])}, activations {format_bytes(num_bytes['activations'])}, "
        f"selection {format_bytes(num_bytes['policy'])}, KV {format_bytes(num_bytes['kv_all'])} "
        f"({format_bytes(num_bytes['kv_token'])} a token); the device has {format_bytes(num_bytes['device'])}, "
        f"below it {format_bytes(num_bytes['below'])}",
    )
    if not record["fits"]:
        yield "fits", "no: neither on the device nor with the tier below it"
        return
    yield "rows", f"{record['policy']}, sparsity {record['sparsity']:g}, kept as {record['kv_dtype']}"
    yield "together", f"{record['together']} of {record['batch']} prompts, {record['waves']} wave(s)"
    yield "schedule", ", ".join(f"{name} {value}" for name, value in record["schedule"].items())
    start, later = record["offload_from"], record["recompute_from"]
    yield (
        "phases",
        "everything stays on the device"
        if start is None
        else f"II from token {start}" + ("; III never (beta = 0)" if later is None else f", III from token {later}"),
    )
    yield "time", f"{record['seconds']:.1f} s, {record['tokens_per_s']:.1f} tok/s, prompts included"
    for name in ("prefill", "decode"):
        parts = record[name]
        total = parts["total_s"]
        shares = ", ".join(f"{part} {parts[f'{part}_s'] / total:.0%}" for part in _PARTS) if total else "-"
        yield name, f"{total:.1f} s: {shares}; hidden {parts['hidden_s']:.1f} s"
    yield from _drafts(record)
    yield from _sparse_prompts(record)
    for note in record["notes"]:
        yield "why", note


def _drafts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    drafts = record["drafts"]
    if drafts is None:
        return
    is_exact = drafts["source"] == "policy"
    maker = f"{record['policy']} makes them up" if is_exact else "from the text"
    yield "drafts", f"{maker}, up to {drafts['most']} a step; {drafts['acceptance']:.0%} are taken to be right"
    yield "", _verdict(drafts)
    one_pass = f"a pass that makes one up {drafts['pass_share']:.0%}, " if is_exact else ""
    yield "", f"of the time of a step without drafts, {one_pass}one more to verify {drafts['token_share']:.0%}"


def _verdict(drafts: dict[str, Any]) -> str:
    """Whether they pay."""
    least = drafts["pays_from"]
    if least is None:
        return "they cannot pay, even if all were right: none are tried, and nothing is gained"
    if not drafts["drafts_per_step"]:
        return f"they do not pay: none are tried, and nothing is gained; they would if {least:.0%} were right"
    return (
        f"{drafts['drafts_per_step']:.1f} a step, which gives {drafts['tokens_per_step']:.2f} tokens: decoding "
        f"takes {drafts['plain_s']:.1f} s without them, {drafts['factor']:.2f} times as long; they pay if {least:.0%} "
        "are right"
    )


def _sparse_prompts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sparse = record["sparse_prompts"]
    if sparse is None:
        return
    if record["prompt_len"] <= DENSE_TOKENS:
        yield "prompts", f"read densely: sparse reading begins after {DENSE_TOKENS} tokens"
        return
    yield (
        "prompts",
        f"read sparsely: {sparse['late_share']:.0%} of the attention after {DENSE_TOKENS} tokens is taken "
        f"to be left, {sparse['share']:.0%} of all; that saves {sparse['saved_s']:.1f} s",
    )


def _memory(record: dict[str, Any]) -> Table:
    table = Table(title="KV memory over the steps", title_justify="left")
    for name in ("token", "phase", "device", "below", "deleted", "ms"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    rows = record["memory"]
    shown = sorted({round(index * (len(rows) - 1) / 6) for index in range(7)})
    for row in (rows[index] for index in shown):
        sizes = [format_bytes(row[f"{name}_bytes"]) for name in ("device", "below", "deleted")]
        table.add_row(str(row["step"]), str(row["phase"]), *sizes, f"{row['seconds'] * 1e3:.1f}")
    return table


def _rates(record: dict[str, Any]) -> Table:
    table = Table(title="Others, and what would help", title_justify="left")
    for name in ("way", "tok/s", "this plan is", ""):
        table.add_column(name, justify="right" if name in ("tok/s", "this plan is") else "left")
    ours = record.get("tokens_per_s")
    for other in record["baselines"]:
        rate = other["tokens_per_s"]
        ratio = f"{ours / rate:.2f}x" if ours and rate else "-"
        table.add_row(other["name"], f"{rate:.1f}" if rate else "-", ratio, other["note"])
    table.add_section()
    for change in record["helps"]:
        factor = f"{change['factor']:.2f} times the rate" if change["factor"] else "would fit"
        table.add_row(change["change"], f"{change['tokens_per_s']:.1f}", "", factor)
    return table
