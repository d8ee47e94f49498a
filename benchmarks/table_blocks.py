"""Blocks of text and tables that `tables.py` puts into the documents, each made from records alone.

A block is a function from the records to Markdown; it gives nothing where there are no records for it, and every block
names the command that made its records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import accuracy_tables
from provenance import provenance

from alisa.lab.bench.compare import RunSeries, read_runs, series_of
from alisa.lab.bench.others import QUIET_SHARE
from alisa.records.schema import RunRecord

Record = dict[str, Any]
Results = Path
"""The directory of the records."""


def lines(path: Path) -> list[Record]:
    """The records of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *body])


def runs(results: Results) -> list[RunRecord]:
    """All records of `alisa bench run`, the newest of each cell."""
    found: dict[str, RunRecord] = {}
    for record in (record for path in sorted((results / "runs").glob("*.jsonl")) for record in read_runs(path)):
        known = found.get(record.cell)
        if known is None or known.stamp.date < record.stamp.date:
            found[record.cell] = record
    return list(found.values())


def number(value: float | None, digits: int = 1) -> str:
    """A figure; nothing where there is none, and no decimals where they would say nothing."""
    return "" if value is None else f"{value:.{0 if abs(value) >= 100 else digits}f}"


def seconds(value: float | None) -> str:
    """A time."""
    return "" if value is None else f"{number(value, 2 if value < 10 else 1)} s"


def gib(value: float | None) -> str:
    """A size."""
    return "" if value is None else f"{value / 2**30:.1f} GiB"


def percent(value: float | None) -> str:
    """A share."""
    return "" if value is None else f"{value:.0%}".replace("%", " %")


# Whole engines


def engines(experiment: str, workload: str | None = None) -> Callable[[Results], str]:
    """A table for each workload of an experiment, or for one of them, fastest first."""

    def block(results: Results) -> str:
        found = [record for record in runs(results) if record.experiment == experiment]
        groups = {name: group for name, group in series_of(found).items() if workload in (None, name)}
        if not any(line.ran for group in groups.values() for line in group):
            return ""
        parts = [_group(name, group) for name, group in groups.items() if any(line.ran for line in group)]
        ran = [(line.run, asdict(record.stamp)) for group in groups.values() for line in group for record in line.ran]
        return "\n\n".join([*parts, provenance(ran), _command(experiment)])

    return block


def _command(experiment: str) -> str:
    name = experiment.replace("-", "_")
    path = f"benchmarks/experiments/{name}.toml"
    return f"`alisa bench run {path} --output benchmarks/results/runs/{name}.jsonl`"


def _group(name: str, group: Sequence[RunSeries]) -> str:
    ran = sorted((line for line in group if line.ran), key=lambda line: -(line.median("tokens_per_s") or 0.0))
    header = ["", "tokens/s", "decode alone", "first token", "peak memory", "of the floor"]
    text = [f"{_title(name, ran[0].ran[0])}:", table(header, [_row(line) for line in ran])]
    remarks = [f"{line.run}: {line.records[-1].reason}" for line in group if not line.ran]
    if remarks:
        text.append("No figures: " + "; ".join(remarks) + ".")
    text += _doubts(ran)
    return "\n\n".join(text)


def _title(name: str, record: RunRecord) -> str:
    """The workload in words."""
    work, budget = record.workload, record.kv_budget_bytes
    prompts = f"prompts of {work.prompt_len} tokens" if work.prompt_len else f"{work.num_sequences} prompts"
    if work.turns:
        prompts = f"{work.turns} turns of {work.prompt_len} new tokens"
    cap = f", K and V capped at {gib(budget)} of {gib(record.kv_need_bytes)}" if budget else ""
    return f"**{name}** ({work.dtype}, {prompts}, {work.output_len} tokens each{cap})"


def _row(line: RunSeries) -> list[str]:
    first = line.median("first_token_median_s") or line.median("first_token_last_s")
    cells = [
        number(line.median("tokens_per_s")),
        number(line.median("decode_tokens_per_s")),
        seconds(first),
        gib(line.median("peak_rss_bytes")),
        percent(line.floor_share),
    ]
    name = f"**{line.run}**" if line.records[0].engine == "alisa" else line.run
    return [name + (" \\*" if line.disturbed else ""), *cells]


def _doubts(ran: Sequence[RunSeries]) -> list[str]:
    """How far these figures can be trusted."""
    fewest, most = min(len(line.ran) for line in ran), max(len(line.ran) for line in ran)
    rounds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    said = [f"Median of {rounds} rounds." if most > 1 else "One run each."]
    disturbed = [line.others_share for line in ran if line.disturbed and line.others_share is not None]
    if disturbed:
        said.append(f"\\* Other programs took up to {percent(max(disturbed))} of the processors meanwhile.")
    if any(line.others_share is None for line in ran):
        said.append("How busy other programs were was not recorded for all.")
    if any(record.floor is None for line in ran for record in line.ran):
        said.append("Some were measured before floors were.")
    return [" ".join(said)]


def machine(results: Results) -> str:
    """Where the runs were made."""
    ran = [record for record in runs(results) if record.figures is not None]
    if not ran:
        return ""
    stamps = [record.stamp for record in ran]
    cpus = sorted({f"{stamp.num_threads} threads of {stamp.cpu}" for stamp in stamps})
    torch = sorted({record.versions["torch"] for record in ran if "torch" in record.versions})
    floors = [record.floor.read_bytes_per_s / 1e9 for record in ran if record.floor is not None]
    speed = f"; memory is read at {min(floors):.0f} to {max(floors):.0f} GB/s" if floors else ""
    real = ", but for the tables of a real model" if any(".gguf" in record.workload.model for record in ran) else ""
    dates = sorted(stamp.date[:10] for stamp in stamps)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"Measured on {' and '.join(cpus)}, torch {', '.join(torch)}, {days}{speed}. Weights are random{real}."


# Tiers


def tiers(results: Results) -> str:
    """Less memory than the cache needs, engine alone."""
    found = {}
    for record in lines(results / "tiers.jsonl"):
        for result in record["results"]:
            found[result["policy"], result["cap"], result["scheduler"], record["shape"], record["kv_dtype"]] = (
                record,
                result,
            )
    if not found:
        return ""
    rows = [
        [
            f"`{result['policy']}`, {record['kv_dtype'] or record['dtype']} rows, {_placed(result)}",
            number(result["tokens_per_s"]),
            f"{number(result['decode_ms'])} ms",
            f"{number(result['parts_ms']['transfer'])} ms",
            f"{result['moved_kb_per_token']:.0f} kB",
        ]
        for record, result in found.values()
    ]
    record = next(iter(found.values()))[0]
    what = f"{record['shape']}, batch {record['batch']}, {record['prompt_len']} + {record['output_len']} tokens"
    header = ["", "tokens/s", "decode step", "of it looking up and waiting", "moved for each token"]
    commands = "`python benchmarks/tiers.py --policy swa --cap 1 0.5 0.25`, `... --policy --cap --static 0.25`"
    shown = f"The engine alone ({what}; the rest of the rows on disk):\n\n{table(header, rows)}"
    made_of = [record for record, _ in found.values()]
    return "\n\n".join([shown, *watched(made_of), _made(made_of), commands])


def watched(records: Sequence[Record]) -> list[str]:
    """How busy other programs were while these were made."""
    shares = [record.get("others_share") for record in records]
    if None in shares:
        return ["How busy other programs were was not recorded."]
    busiest = max(share for share in shares if share is not None)
    return (
        [f"Other programs took up to {percent(busiest)} of the processors meanwhile."] if busiest > QUIET_SHARE else []
    )


def _made(records: Iterable[Record]) -> str:
    """Where they come from."""

    def line(record: Record) -> str:
        return ", ".join(str(record[name]) for name in ("model", "shape", "dtype", "batch") if name in record)

    return provenance((line(record), record.get("stamp")) for record in records)


def _placed(result: Record) -> str:
    if result["scheduler"] == "all-device":
        return "everything fits"
    how = ", a fixed split as in FlexGen" if result["scheduler"] == "static" else ""
    return f"cap {percent(result['cap'])}{how}"


def restore(results: Results) -> str:
    """What one row costs to get back."""
    record = (lines(results / "restore.jsonl") or [None])[-1]
    if record is None:
        return ""
    rows = [
        [
            f"{result['shape']}, {result['row_bytes']} bytes",
            *(f"{result[name]:.1f}" for name in ("fetch_cached_us", "fetch_cold_us", "rebuild_cached_us")),
            f"{result['token_id_us_at_least']:.0f}",
        ]
        for result in record["results"]
    ]
    header = ["microseconds for a row", "from the page cache", "from the disk", "rebuilt from its layer input"]
    shown = table([*header, "from its token, at least"], rows)
    return "\n\n".join([shown, *watched([record]), _made([record]), "`python benchmarks/restore.py`"])


def eviction(results: Results) -> str:
    """Who should leave the hot cache first."""
    rows = [
        [f"`{r['policy']}`", percent(record["cap"]), r["eviction"], f"{r['fetched_rows']}", f"{r['hit_rate']:.2%}"]
        for record in lines(results / "eviction.jsonl")
        for r in record["results"]
    ]
    if not rows:
        return ""
    header = ["policy", "cap", "leaves first", "rows fetched", "found on the device"]
    shown = [table(header, rows), _made(lines(results / "eviction.jsonl"))]
    return "\n\n".join([*shown, "`python benchmarks/eviction.py --text FILE --cap 0.25`"])


# Kernels and steps


def kernels(results: Results) -> str:
    """Every native kernel against torch and against the memory it must read."""
    records = lines(results / "kernels.jsonl")
    shown = _kernels(records)
    command = "`alisa bench kernels --case all --output benchmarks/results/kernels.jsonl`"
    return "\n\n".join([*shown, _made(records), command]) if shown else ""


def _by_role(case: Record) -> dict[str, float | None]:
    """Speed-ups by what they are against; records of version 0.1 call the reference a twin."""
    return {"reference" if role == "twin" else role: value for role, value in case["speedup"].items()}


def _kernels(records: Sequence[Record]) -> list[str]:
    """A table of the newest record of each case, and how to read it."""
    found = {
        (record["isa"], case["case"]): case | {"speedup": _by_role(case)}
        for record in records
        for case in record["cases"]
    }
    if not found:
        return []
    titles = {"dense": "dense SDPA", "gather": "gather + SDPA", "packed": "torch bf16", "reference": "torch reference"}
    roles = [role for role in titles if any(role in case["speedup"] for case in found.values())]
    rows = []
    for (isa, name), case in found.items():
        kernel = next(timing for timing in case["timings"].values() if timing["role"] == "kernel")
        times = [1e3 * kernel[part] for part in ("median_s", "low_s", "high_s")]
        rivals = [case["speedup"].get(role) for role in roles]
        busy = " \\*" if case["others_share"] > QUIET_SHARE else ""
        rows.append(
            [
                f"{name} ({isa}){busy}",
                f"{times[0]:.3g} ({times[1]:.3g} to {times[2]:.3g})",
                f"{case['kernel_bytes_per_s'] / 1e9:.1f}",
                percent(case["bandwidth_share"]),
                *("" if rival is None else f"{rival:.1f}x" for rival in rivals),
            ]
        )
    header = ["case", "ms (quartiles)", "GB/s", "of read bandwidth", *(titles[role] for role in roles)]
    text = ["Times as long as the kernel that torch takes, by its fastest way of each kind:", table(header, rows)]
    if any("\\*" in row[0] for row in rows):
        text.append("\\* Other programs were busy meanwhile.")
    return text


def prompts(results: Results) -> str:
    """Attention while a prompt is read, against torch's and against the products in it."""
    records = lines(results / "prompt_pieces.jsonl")
    if not records:
        return ""
    rows = []
    for case in records[-1]["results"]:
        low, middle, high = (1e3 * value for value in case["native_s"])
        busy = " \\*" if case["others_share"] > QUIET_SHARE else ""
        rows.append(
            [
                case["name"] + busy,
                f"{case['num_heads']} / {case['num_kv_heads']} x {case['head_dim']}",
                f"{middle:.3g} ({low:.3g} to {high:.3g})",
                number(1e3 * case["floor_s"]),
                *(
                    f"{case[name][1] / case['native_s'][1]:.1f}x" if name in case else ""
                    for name in ("flash_s", "plain_s")
                ),
            ]
        )
    header = [
        "attention of a prompt",
        "heads / KV heads",
        "ms (quartiles)",
        "products alone, ms",
        "flash SDPA",
        "torch reference",
    ]
    text = ["Prompts in bfloat16; the products alone at the rate of a large matrix product in the same rounds:"]
    text.append(table(header, rows))
    if any("\\*" in row[0] for row in rows):
        text.append("\\* Other programs were busy meanwhile.")
    command = "`python benchmarks/prompt_pieces.py --record benchmarks/results/prompt_pieces.jsonl`"
    return "\n\n".join([*text, _made(records[-1:]), command])


def decode_step(results: Results) -> str:
    """One decode step against the matrix products in it."""
    rows = []
    found = {
        (record["shape"], record["dtype"], record["batch"], record["prompt_len"], record["output_len"]): record
        for record in lines(results / "decode_step.jsonl")
    }
    for record in found.values():
        for policy, result in record["results"].items():
            step = result["step_ms"]
            rows.append(
                [
                    f"{record['shape']}, {record['dtype']}, batch {record['batch']}",
                    f"`{policy}`",
                    *(number(step[part]) for part in ("wall", "linear", "attention", "selection")),
                    f"{number(record['floor_gemm_ms'])} / {number(record['floor_read_ms'])}",
                    f"{result['linear_over_floor']:.2f}",
                ]
            )
    if not rows:
        return ""
    header = ["model", "policy", "step, ms", "linear", "attention", "selection", "products / reading alone"]
    commands = [
        f"`python benchmarks/decode_step.py --shape {shape} --dtype {dtype} --batch {batch} --prompt-len {prompt} "
        f"--output-len {output} --record benchmarks/results/decode_step.jsonl`"
        for shape, dtype, batch, prompt, output in found
    ]
    shown = table([*header, "linear over products"], rows)
    return "\n\n".join([shown, *watched(list(found.values())), _made(found.values()), "  \n".join(commands)])


def prediction(results: Results) -> str:
    """What the planner says against what happens."""
    found = lines(results / "prediction.jsonl")
    if not found:
        return ""
    rows = [
        [
            f"{r['model']}, `{r['policy']}`, {r['kv_dtype']} rows, batch {r['batch']}, {r['placement']}",
            f"{number(r['measured_ms'])} ({number(r['spread_ms'][0])} to {number(r['spread_ms'][1])})",
            number(r["predicted_ms"]),
            f"{100 * r['error']:+.0f} %",
        ]
        for r in found
    ]
    errors = [abs(r["error"]) for r in found]
    summary = (
        f"{len(errors)} configurations, {found[0]['rounds']} rounds: median error {100 * median(errors):.0f} %, worst "
        f"{100 * max(errors):.0f} %."
    )
    shown = table(["", "measured, ms a step", "predicted", "error"], rows)
    return f"{shown}\n\n{summary} {_made(found)}\n\n`alisa profile`, then `python benchmarks/prediction.py`"


def schedules(results: Results) -> str:
    """What the search chose against what was made by hand."""
    parts = []
    for record in lines(results / "schedules.jsonl"):
        times = sorted(record["seconds"].items(), key=lambda item: median(item[1]))
        rows = [
            [f"**{name}**" if name == "the search's choice" else name, f"{median(taken):.2f}", f"{min(taken):.2f}"]
            for name, taken in times
        ]
        work = (
            f"{record['shape']}, `{record['policy']}`, batch {record['batch']}, {record['prompt_len']} + "
            f"{record['output_len']} tokens, {100 * record['cap']:.0f} % of the rows on the device"
        )
        parts.append(
            f"{work} (seconds, {record['rounds']} runs each):\n\n{table(['schedule', 'median', 'least'], rows)}\n\n"
            f"The choice takes {100 * record['over_best']:+.1f} % of the best by hand; {record['predicted_s']:.2f} s "
            f"were predicted. `python benchmarks/schedules.py --shape {record['shape']} "
            f"--policy {record['policy']} --cap "
            f"{record['cap']:g}`\n\n{_made([record])}"
        )
    return "\n\n".join(parts)


# Accuracy


def accuracy(results: Results) -> str:
    """Perplexity lost by policy and sparsity, on the text of which there is most."""
    found = [r for r in _accuracy(results, "ppl_heldout.jsonl") if r["sparsity"] in (0.8, 0.9)]
    if not found:
        return ""
    policies = list(dict.fromkeys(record["policy"] for record in found))
    sparsities = sorted({record["sparsity"] for record in found})
    cells = {(r["policy"], r["sparsity"]): accuracy_tables.cost(r) for r in found}
    rows = [[f"`{policy}`", *(cells.get((policy, s), "") for s in sparsities)] for policy in policies]
    work = found[0]["settings"]
    what = (
        f"Per cent of perplexity lost on the text `{found[0]['task']}`, model `{found[0]['model']}`, "
        f"{work['windows']} windows of {work['context']} tokens, {work['prefill']} of them a prompt"
    )
    command = (
        f"`alisa eval ppl --text DIR --context {work['context']} --windows {work['windows']} --mode {work['mode']} "
        f"--sparsity {','.join(f'{s:g}' for s in sparsities)}`"
    )
    return f"{what}:\n\n{table(['policy', *(f'sparsity {s:g}' for s in sparsities)], rows)}\n\n{command}"


def recall(results: Results) -> str:
    """Facts found again by policy."""
    found = [
        r for r in _accuracy(results, "recall.jsonl") if r["sparsity"] in (0.0, 0.8) and r["task"].split()[0] != "copy"
    ]
    if not found:
        return ""
    policies = list(dict.fromkeys(record["policy"] for record in found))
    tasks = list(dict.fromkeys(record["task"] for record in found))
    cells = {(r["task"], r["policy"]): f"{100 * r['value']:.3g} %" for r in found}
    counts = {record["task"]: record["targets"] for record in found}
    rows = [[f"{task} ({counts[task]} questions)", *(cells.get((task, p), "") for p in policies)] for task in tasks]
    shares = sorted({record["sparsity"] for record in found if record["policy"] != "dense"})
    what = f"Facts looked up in prose at a sparsity of {', '.join(f'{s:g}' for s in shares)}, answers found"
    command = "`alisa eval recall --task needle,multi,lookup --text DIR --length 512,1024`"
    return f"{what}:\n\n{table(['task and length', *(f'`{p}`' for p in policies)], rows)}\n\n{command}"


def _accuracy(results: Results, name: str) -> list[Record]:
    path = results / "accuracy" / name
    return accuracy_tables.read([path]) if path.exists() else []


def loading(results: Results) -> str:
    """What loading a GGUF file takes: the newest record of each model and weight format, or of llama.cpp."""
    newest = {(record["model"], record["weights"]): record for record in lines(results / "loading.jsonl")}
    rows = [
        [
            f"`{model}`",
            f"llama.cpp ({record['version']})" if "version" in record else weights,
            *(f"{record[name]:.2f}" if name in record else "" for name in ("header_s", "tokenizer_s", "weights_s")),
            f"{record['all_s']:.2f}",
            *(f"{record[name] / 2**20:.0f}" for name in ("weight_bytes", "rss_before", "rss_peak")),
            number(record.get("gguf_package_header_s")),
        ]
        for (model, weights), record in sorted(newest.items(), key=lambda item: item[1]["file_bytes"])
    ]
    if not rows:
        return ""
    heads = ["file", "weights", "header, s", "tokenizer, s", "weights, s", "all, s", "weights, MiB"]
    shown = table([*heads, "RSS before", "RSS peak", "`gguf` package, header, s"], rows)
    return "\n\n".join([shown, _made(newest.values())])


def one_user(results: Results) -> str:
    """One sequence of a small real model: the newest record of each case."""
    names = {"auto": "bfloat16", "float": "bfloat16"}
    newest = {
        (
            names.get(record["weight_dtype"], record["weight_dtype"]),
            record["kv_dtype"],
            record["policy"],
            record["prompt_len"],
        ): record
        for record in lines(results / "one_user.jsonl")
    }
    rows = []
    for (weights, kv_dtype, policy, prompt_len), record in newest.items():
        steps = record["step_s"]
        rows.append(
            [
                weights,
                names.get(kv_dtype, kv_dtype),
                f"`{policy}`",
                str(prompt_len),
                f"{1 / steps['median']:.0f} ({1 / max(steps['all']):.0f} to {1 / min(steps['all']):.0f})",
                f"{100 * record['floor_s'] / steps['median']:.0f} %",
                f"{prompt_len / record['prefill_s']:.0f}",
            ]
        )
    heads = ["weights", "rows", "policy", "prompt", "decode, tokens/s", "of the floor", "prompt, tokens/s"]
    if not rows:
        return ""
    first = next(iter(newest.values()))
    command = "`python benchmarks/one_user.py --record benchmarks/results/one_user.jsonl`"
    shown = f"`{first['model']}`, one sequence:\n\n{table(heads, rows)}"
    return "\n\n".join([shown, _made(newest.values()), command])


def speculation(results: Results) -> str:
    """Drafts against one token at a time: the newest record of each case."""
    newest = {record["case"]: record for record in lines(results / "speculation.jsonl")}
    rows = []
    for case, record in newest.items():
        ways = record["results"]
        for way, found in ways.items():
            base = ways[way.replace(" speculative=lookup", "") if "speculative" in way else "policy=dense"]
            drafts = f"{100 * found['accepted'] / found['drafted']:.0f} %" if found["drafted"] else ""
            options = " ".join(f"--{part.replace('=True', '').replace('=', ' ')}" for part in way.split())
            rows.append(
                [
                    case,
                    f"`{options}`",
                    f"{found['tokens_per_s']:.1f} ({min(found['rates']):.1f} to {max(found['rates']):.1f})",
                    f"{found['tokens_per_s'] / base['tokens_per_s']:.2f}",
                    f"{found['tokens_per_step']:.2f}",
                    drafts,
                    f"{100 * found['tokens_per_s'] / record['floor_tokens_per_s']:.0f} %",
                ]
            )
    heads = ["case", "options", "tokens/s", "x plain", "tokens a step", "drafts that came", "of the dense floor"]
    if not rows:
        return ""
    first = next(iter(newest.values()))
    shown = f"`{first['model']}` (`benchmarks/speculation.py`):\n\n{table(heads, rows)}"
    return "\n\n".join([shown, _made(newest.values())])


def pace(results: Results) -> str:
    """The longest wait between two tokens while a long prompt is read: the newest record of each setting."""
    newest = {record["max_step_tokens"]: record for record in lines(results / "pace.jsonl")}
    rows = [
        [
            "prompts first" if most is None else f"`--max-step-tokens {most}`",
            seconds(record["longest_gap_s"]),
            seconds(record["first_token_s"]),
        ]
        for most, record in newest.items()
    ]
    if not rows:
        return ""
    first = next(iter(newest.values()))
    heads = ["", "longest time between two tokens of the reader", "first token of the long prompt"]
    return (
        f"A prompt of {first['prompt_len']} tokens comes while another request is being answered, "
        f"`{first['model']}`, {len(first['rounds'])} rounds (`benchmarks/pace.py`):\n\n{table(heads, rows)}\n\n"
        f"{_made(newest.values())}"
    )


def prefix(results: Results) -> str:
    """Time to the first token with and without a prefix cache: the newest record."""
    records = lines(results / "prefix_cache.jsonl")
    if not records:
        return ""
    record = records[-1]
    found = record["results"]
    says = {
        "burst": f"{record['requests']} prompts at once",
        "one by one": f"{record['requests']} prompts, one after the other",
        "texts": f"{record['requests']} texts of one prompt",
        "conversation": f"a conversation of {record['turns'] + 1} turns",
    }

    def first(name: str) -> str:
        return seconds(found[name]["mean_first_token_s"])

    rows = [[text, first(case), first(f"{case}, cache")] for case, text in says.items()]
    rows.append(["the same, its answers read in the pauses", "", first("answers read, cache")])
    heads = ["", "without", "with the prefix cache"]
    return (
        f"Mean time to the first token, `{record['model']}`, {record['policy']}; {record['system']} tokens that all "
        f"prompts begin with, {record['own']} of each one's own, {record['output_len']} tokens of output "
        f"(`benchmarks/prefix_cache.py`):\n\n{table(heads, rows)}\n\n{_made([record])}"
    )


# GPU


def gpu(results: Results) -> str:
    """What `make gpu-check` found: engines end to end, and kernels."""
    records = lines(results / "gpu.jsonl")
    found = {(r["device"], r["run"]): r for r in records if r["kind"] == "gpu-run"}
    text = []
    if found:
        first = next(iter(found.values()))
        work = first["workload"]
        text.append(
            f"{work['shape']} with dummy weights, {work['dtype']}, batch {work['batch']}, {work['prompt_len']} + "
            f"{work['output_len']} tokens, device memory limited to {gib(first['device_memory_bytes'])}:"
        )
        header = ["", "tokens/s", "decode alone", "first token", "peak device memory", "remark"]
        text.append(table(header, [[f"{run} ({device})", *_gpu_cells(r)] for (device, run), r in found.items()]))
    text += _kernels([r for r in records if r["kind"] == "gpu-kernels" and r["status"] == "ran"])
    return "\n\n".join([*text, "`make gpu-check`"]) if text else ""


def _gpu_cells(record: Record) -> list[str]:
    if record["status"] != "ran":
        return ["", "", "", "", f"{record['status']}: {record['reason']}"]
    figures = record["figures"]
    return [
        number(figures["tokens_per_s"]),
        number(figures["decode_tokens_per_s"]),
        seconds(figures["first_token_last_s"]),
        gib(figures["peak_device_bytes"]),
        "",
    ]
