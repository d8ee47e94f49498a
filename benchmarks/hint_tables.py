"""Blocks of what was measured and left out of `sketch`, from `prefetch_hint.py` and `sketch_forms.py`."""

from __future__ import annotations

from table_blocks import Record, Results, lines, number, percent, table, watched


def waiting(results: Results) -> str:
    """Decode steps under caps, and what of them is waiting."""
    record = _newest(results)
    if record is None:
        return ""
    names = {"cached": "page cache", "disk": "disk"}
    rows = [
        [
            f"{case['sparsity']:g}, {percent(case['cap'])}",
            names[way],
            number(found["rows"], 0),
            _quartiles(found["wall_ms"]),
            _quartiles(found["wait_ms"]),
        ]
        for case in record["results"]
        for way, found in case["engine"].items()
    ]
    head = ["sparsity, cap", "rows come from", "rows a step", "step, ms (quartiles)", "of it waiting"]
    work = f"batch {record['batch']}, {record['prompt_len']} + {record['output_len']} tokens"
    threads, cpu = record["stamp"]["num_threads"], record["stamp"]["cpu"]
    where = f"{threads} thread{'s' if threads > 1 else ''} of {cpu}"
    what = f"`{record['model']}`, {record['dtype']}, {work}, {where}:"
    return "\n\n".join([what, table(head, rows), *watched([record])])


def hint(results: Results) -> str:
    """What guesses foresee, what the hint should win, and what it did."""
    record = _newest(results)
    if record is None:
        return ""
    rows = []
    for case in record["results"]:
        if "tried" not in case:
            continue
        guesses = [
            f"{percent(case['foreseen'][name])} ({case['wasted'][name]:.2f})"
            for name in ("last read", "runners-up", "hint")
        ]
        cells = []
        for medium in ("cached", "disk"):
            without, with_hint = (case["tried"][way]["wall_ms"][1] for way in (medium, f"{medium} hint"))
            cells += [f"{100 * expected(record, case, medium):+.0f} %", f"{100 * (without / with_hint - 1):+.0f} %"]
        rows.append([f"{case['sparsity']:g}, {percent(case['cap'])}", *guesses, *cells])
    head = ["sparsity, cap", "last read", "runners-up", "hint"]
    head += ["page cache: expected", "tried", "disk: expected", "tried"]
    return f"{table(head, rows)}\n\n`{_command(record)}`"


def expected(record: Record, case: Record, medium: str) -> float:
    """By how much decode should be faster, if what the hint foresees is fetched beside the MLP.

    The waiting for these rows is saved as far as the MLP takes as long; the query, its ranking and asking for the rows
    are added.
    """
    found = case["engine"][medium]
    wall, wait, linear = (found[name][1] for name in ("wall_ms", "wait_ms", "linear_ms"))
    hidden = min(case["foreseen"]["hint"] * wait, record["mlp_share"] * linear)
    added = record["query_share"] * linear + case["extra_ms"]["rank"] + case["extra_ms"]["ask"]
    return wall / (wall - hidden + added) - 1


def forms(results: Results) -> str:
    """What the sketch loses where it knows less of the keys."""
    rows = []
    for record in lines(results / "sketch_forms.jsonl"):
        for name, form in record["forms"].items():
            is_base = name == "4 bits"
            rows.append(
                [
                    f"{record['sparsity']:g}",
                    name,
                    number(form["bytes"], 0),
                    "" if form["kernel"] is None else f"{form['kernel']:.2f}",
                    _share(form["lost"], form["lost_error"]),
                    _thousandths(form["kl"], form["kl_error"]),
                    "" if is_base else _thousandths(form["kl_more"], form["kl_more_error"]),
                ]
            )
    if not rows:
        return ""
    first = lines(results / "sketch_forms.jsonl")[0]
    head = ["sparsity", "form", "bytes", "kernel", "perplexity lost, %", "KL", "against 4 bits"]
    windows = f"{first['windows']} x {first['context']} tokens, {first['prefill']} of them a prompt"
    what = f"`{first['model']}`, {first['text']}, {windows}, dense {first['dense']:.2f}; KL in thousandths of a nat"
    return f"{what}:\n\n{table(head, rows)}"


def _newest(results: Results) -> Record | None:
    records = lines(results / "prefetch_hint.jsonl")
    return records[-1] if records else None


def _command(record: Record) -> str:
    return (
        f"python benchmarks/prefetch_hint.py --model SMOLLM2 --text DATA/{record['text']} "
        "--record benchmarks/results/prefetch_hint.jsonl"
    )


def _quartiles(values: list[float]) -> str:
    low, middle, high = values
    return f"{number(middle)} ({number(low)} to {number(high)})"


def _share(value: float, error: float) -> str:
    return f"{100 * value:.2f} ± {100 * error:.2f}"


def _thousandths(value: float, error: float) -> str:
    return f"{1e3 * value:.2f} ± {1e3 * error:.2f}"
