"""Blocks of tables for the accuracy of real models; see `table_blocks.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import accuracy_tables
from table_blocks import Record, Results, lines, table

from alisa.lab.eval.statistics import Estimate, difference, mean
from alisa.quality import QUALITIES

MODELS = ("smollm2", "gemma3")
"""Ends of the names of the files with their records."""

TEXTS = {"wikitext2": "WikiText-2", "ptb": "PTB", "heldout": "held-out prose", "python3.11": "Python's sources"}
TEXTS |= {"test.txt": TEXTS["wikitext2"], "bram-stoker-dracula.txt": "Dracula"}  # files
_MOST = 0.95
"""Sparsity up to which every text was measured."""
_POLICIES = ("sketch", "swa", "h2o", "streaming")


def perplexity(results: Results, context: int | None = None) -> str:
    """Perplexity lost: a table for each model, a row for each text and length, or for one length."""
    parts = []
    for model in MODELS:
        found = [
            r
            for r in _records(results, f"ppl_{model}.jsonl")
            if r["policy"] in ("dense", *_POLICIES)
            and r["sparsity"] <= _MOST
            and context in (None, r["settings"]["context"])
        ]
        columns = _columns(found)
        if not columns:
            continue
        rows: dict[tuple[int, str], dict[tuple[str, float], Record]] = {}
        for record in found:
            text = (record["settings"]["context"], record["task"])
            rows.setdefault(text, {})[record["policy"], record["sparsity"]] = record
        head = ["text", "windows", "dense", *(f"`{policy}` {sparsity:g}" for policy, sparsity in columns)]
        order = sorted(rows, key=lambda row: (row[0], list(TEXTS).index(row[1])))
        body = []
        for length, text in order:
            cells = rows[length, text]
            dense = cells["dense", 0.0]
            windows = f"{dense['settings']['windows']} x {length}"
            costs = [accuracy_tables.cost(cells[column]) if column in cells else "" for column in columns]
            body.append([TEXTS[text], windows, accuracy_tables.level(dense), *costs])
        parts += [f"{_title(found[0])}:", table(head, body)]
    return "\n\n".join(parts)


def policies(results: Results) -> str:
    """All that was measured of the variants of `sketch`, by sparsity."""
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in _records(results, "ppl_smollm2.jsonl"):
        groups.setdefault((record["model"], record["task"], record["settings"]["context"]), []).append(record)
    parts = []
    for (_, text, context), found in groups.items():
        if any(record["policy"] == "sketch-mean" for record in found):
            windows = found[0]["settings"]["windows"]
            parts.append(f"{_title(found[0])}, {TEXTS[text]}, {windows} x {context} tokens:")
            parts.append(
                "\n".join(
                    accuracy_tables.by_sparsity([r for r in found if r["policy"] not in ("swa", "h2o", "streaming")])
                )
            )
    return "\n\n".join(parts)


def rows(results: Results) -> str:
    """What fewer bits of K and V cost: a table for each model and text, a row for each format."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in _records(results, "rows_real.jsonl"):
        if record.get("coverage") is None:
            groups.setdefault((record["model"], record["task"]), []).append(record)
    parts = []
    for (_, text), found in groups.items():
        dense = next(record for record in found if record["versus_dense"] == 1.0)
        columns = list(dict.fromkeys((record["policy"], record["sparsity"]) for record in found))
        cells = {(record["kv_dtype"], (record["policy"], record["sparsity"])): record for record in found}
        body = []
        for kv_dtype in ("int8", "k8v4", "int4"):
            of_format = [cells.get((kv_dtype, column)) for column in columns]
            size = next(record["kv_token_bytes"] for record in of_format if record) / dense["kv_token_bytes"]
            costs = [accuracy_tables.cost(record) if record else "" for record in of_format]
            body.append([f"`{kv_dtype}`", f"{size:.0%}".replace("%", " %"), *costs])
        head = [
            "rows",
            "bytes",
            *(f"`{policy}`" + (f" {sparsity:g}" if sparsity else "") for policy, sparsity in columns),
        ]
        windows = f"{dense['settings']['windows']} x {dense['settings']['context']} tokens"
        what = f"{_title(dense)}, {TEXTS[text]}, {windows}; dense: {accuracy_tables.level(dense)}."
        parts += [what, table(head, body)]
    return "\n\n".join(parts)


def weight_formats(results: Results) -> str:
    """What weights in fewer bits cost: the newest record of each file and format."""
    newest = {(r["model"], r["weights"]): r for r in lines(results / "weight_formats.jsonl")}
    body = [
        [
            f"`{model}`",
            weights,
            f"{record['weight_bytes'] / 2**20:.0f}",
            f"{record['perplexity']:.2f}",
            ""
            if record["versus"] == 1.0
            else _estimate(Estimate(record["versus"] - 1, record["versus_error"]), 100, 2),
        ]
        for (model, weights), record in newest.items()
    ]
    return table(["file", "weights", "MiB", "perplexity", "lost, %"], body) if body else ""


def coverage(results: Results) -> str:
    """A coverage against fixed sparsities: a row for each setting, perplexity lost and tokens read of each text."""
    found = _records(results, "coverage_real.jsonl")
    columns = list(dict.fromkeys((r["model"], r["task"], r["settings"]["context"]) for r in found))
    settings = sorted({(r["sparsity"], r.get("coverage") or 0.0) for r in found if r["policy"] != "dense"})
    cells = {
        (r["model"], r["task"], r["settings"]["context"], r["sparsity"], r.get("coverage") or 0.0): r for r in found
    }
    body = []
    for sparsity, covered in settings:
        row = [f"{sparsity:g}", f"{covered:g}" if covered else ""]
        for column in columns:
            record = cells.get((*column, sparsity, covered))
            row += [accuracy_tables.cost(record), f"{100 * record['read_share']:.1f}"] if record else ["", ""]
        body.append(row)
    head = ["sparsity", "coverage"]
    for model, text, context in columns:
        head += [f"{model.split('-')[0]}, {TEXTS[text]}, {context}", "read, %"]
    return table(head, body) if body else ""


def quality(results: Results) -> str:
    """The rungs of `--quality`: bytes kept and read of a token, against dense attention, and the perplexity lost."""
    found = _records(results, "quality_real.jsonl")
    dense = [record for record in found if record["versus_dense"] == 1.0 and record["policy"] == "dense"]
    cells = {(r["model"], r["task"], r["policy"], r["sparsity"], r["kv_dtype"]): r for r in found}
    body = []
    for name, rung in QUALITIES.items():
        own = [cells.get((d["model"], d["task"], rung.policy, rung.sparsity, rung.kv_dtype)) for d in dense]
        row = [f"`{name}`", f"`{rung.policy}`", f"{rung.sparsity:g}", f"`{rung.kv_dtype}`"]
        if rung.policy == "dense":
            body.append([*row, "100 %", "100 %", *("0" for _ in dense)])
            continue
        first = next((record for record in own if record), None)
        sizes = ["", ""]
        if first is not None:
            rows, state, whole = first["kv_token_bytes"], first["policy_token_bytes"], dense[0]["kv_token_bytes"]
            sizes = [f"{100 * (part * rows + state) / whole:.0f} %" for part in (1, 1 - rung.sparsity)]
        body.append([*row, *sizes, *(accuracy_tables.cost(record) if record else "" for record in own)])
    head = ["name", "policy", "sparsity", "rows", "kept", "read"]
    head += [f"{d['model'].split('-')[0]}, {TEXTS[d['task']]}, {d['settings']['context']}" for d in dense]
    return table(head, body) if dense else ""


def layer_budgets(results: Results) -> str:
    """Ways to share out the tokens of a step: divergence from dense attention with equal budgets, and against it."""
    body = []
    for record in lines(results / "layer_budgets.jsonl"):
        ways = record["ways"]
        name = TEXTS.get(record["text"], record["text"])
        text = f"{name}, {record['windows']} x {record['context']}"
        row = [record["model"].split("-")[0], text, f"{record['sparsity']:g}"]
        row.append(_estimate(Estimate(ways["equal"]["kl"], ways["equal"]["kl_error"]), 1e3, 2))
        for way in ("unread", "error", "search"):
            found = ways.get(way)
            gap = found and Estimate(found["against_equal"], found["against_equal_error"])
            row.append(_estimate(gap, 1e3, 2) if gap else "")
        body.append(row)
    return table(["model", "text", "sparsity", "equal", "`unread`", "`error`", "`search`"], body) if body else ""


def sparse_prefill(results: Results) -> str:
    """Rules by which a prompt might be read sparsely: what each loses and leaves to be done, most products first."""
    rows: dict[tuple[Any, ...], Record] = {}
    for record in lines(results / "sparse_prefill.jsonl"):
        key = tuple(record[name] for name in ("model", "text", "context", "windows", "rule", "parameter"))
        rows[key] = rows.get(key, {}) | record  # a survey has no divergence, and one does not replace it
    body = [
        [
            record["model"].split("-")[0],
            f"{TEXTS.get(record['text'], record['text'])}, {record['windows']} x {record['context']}",
            f"`{record['rule']}` {record['parameter']:g}",
            f"{100 * record['left_out']:.1f} %",
            _of_windows(record["kl"], record["kl_error"], 1e3) if "kl" in record else "",
            f"{1e3 * record['kl_most']:.0f}" if "kl_most" in record else "",
            _of_windows(record["lost"], record["lost_error"], 100) if "kl" in record else "",
            f"{100 * record['chosen']:.0f} %",
            f"{100 * record['products']:.0f} %",
            "" if record["rule"] == "exact" else f"{1 / record['products']:.2f}x",
        ]
        for _, record in sorted(rows.items(), key=lambda row: (*row[0][:3], -row[1]["products"]))
    ]
    head = ["model", "text", "rule", "weight left out", "divergence", "of one token"]
    head += ["perplexity lost, %", "a query reads", "products left", "at best"]
    return table(head, body) if body else ""


def sparse_prompts_time(results: Results) -> str:
    """What `--sparse-prompts` saves of the time of reading a prompt."""
    found = {
        (record["model"], record["context"], record["alpha"]): record
        for record in lines(results / "sparse_prompts.jsonl")
        if record["kind"] == "sparse-prompts-time"
    }
    body = [
        [
            record["model"].split("-")[0],
            str(record["context"]),
            f"{record['alpha']:g}",
            f"{record['dense_cpu_s']:.1f} s",
            f"{record['sparse_cpu_s']:.1f} s",
            f"{record['dense_cpu_s'] / record['sparse_cpu_s']:.2f}x",
        ]
        for _, record in sorted(found.items())
    ]
    return table(["model", "tokens", "alpha", "dense", "sparse", "as fast"], body) if body else ""


def sparse_prompts_loss(results: Results) -> str:
    """What `--sparse-prompts` loses of perplexity and of recall."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for record in lines(results / "sparse_prompts.jsonl"):
        what = [record["model"].split("-")[0]]
        if record["kind"] == "sparse-prompts-loss":
            text = TEXTS.get(record["text"], record["text"])
            what += [f"{text}, {record['windows']} x {record['context']}", f"{record['alpha']:g}"]
            lost = _of_windows(record["lost"], record["lost_error"], 100)
            figures = [f"{100 * record['read']:.0f} %", f"perplexity {record['perplexity']:.2f}", f"{lost} %"]
        elif record["kind"] == "sparse-prompts-recall":
            what += [f"{record['task']}, {record['texts']} texts", f"{record['alpha']:g}"]
            level = f"{100 * record['dense']:.0f} % recalled"
            figures = [
                f"{100 * record['read']:.0f} %",
                level,
                f"{100 * (record['dense'] - record['sparse']):.0f} points",
            ]
        else:
            continue
        rows[tuple(what)] = figures
    head = ["model", "text", "alpha", "products left", "dense", "lost"]
    return table(head, [[*what, *figures] for what, figures in sorted(rows.items())]) if rows else ""


def by_task(kind: str, results: Results) -> str:
    """Recall or multiple choice: a table for each model; dense attention's level, and what the others lose."""
    parts = []
    for model in MODELS:
        found = _records(results, f"{kind}_{model}.jsonl")
        columns = _columns(found)
        if not columns:
            continue
        rows: dict[str, dict[tuple[str, float], Record]] = {}
        for record in found:
            rows.setdefault(record["task"], {})[record["policy"], record["sparsity"]] = record
        head = ["task", "dense", *(f"`{policy}` {sparsity:g}" for policy, sparsity in columns)]
        body = [
            [
                task,
                accuracy_tables.level(cells["dense", 0.0]),
                *(accuracy_tables.cost(cells[column]) if column in cells else "" for column in columns),
            ]
            for task, cells in rows.items()
        ]
        parts += [f"{_title(found[0])}:", table(head, body)]
    return "\n\n".join(parts)


def generation(results: Results) -> str:
    """Long texts: repetition, length and what dense attention makes of them."""
    parts = []
    for model in MODELS:
        found = _records(results, f"generation_{model}.jsonl")
        if not found:
            continue
        dense = next(record for record in found if record["policy"] == "dense")
        work = dense["settings"]
        body = [
            [
                f"`{record['policy']}`" + (f" {record['sparsity']:g}" if record is not dense else ""),
                f"{100 * record['value']:.1f} %",
                "" if record is dense else _estimate(difference(record["units"], dense["units"]), 100, 1),
                f"{mean(record['lengths']).value:.0f}",
                f"{exp(mean(record['dense_nats']).value):.2f}",
                "" if record is dense else _estimate(difference(record["dense_nats"], dense["dense_nats"]), 1, 2),
            ]
            for record in found
        ]
        head = ["policy", "repeated", "points more than dense", "tokens", "perplexity", "nats more than dense"]
        what = (
            f"{_title(dense)}, {work['texts']} texts of up to {work['max_tokens']} tokens after prompts of "
            f"{work['prompt']}, temperature {work['temperature']:g}:"
        )
        parts += [what, table(head, body)]
    return "\n\n".join(parts)


def _records(results: Results, name: str) -> list[Record]:
    path = results / "accuracy" / name
    return accuracy_tables.read([path]) if path.exists() else []


def _columns(records: Sequence[Record]) -> list[tuple[str, float]]:
    """Policy and sparsity of all but dense, in the order of a table."""
    found = {(record["policy"], record["sparsity"]) for record in records if record["policy"] != "dense"}
    return sorted(found, key=lambda column: (_POLICIES.index(column[0]), column[1]))


def _title(record: Record) -> str:
    return f"`{record['model']}` in {record['stamp']['dtype']}"


def _estimate(estimate: Estimate, scale: float, digits: int) -> str:
    return f"{scale * estimate.value + 0.0:.{digits}f} ± {scale * estimate.standard_error:.{digits}f}"


def _of_windows(value: float, error: float | None, scale: float) -> str:
    """One window has no error."""
    return f"{scale * value + 0.0:.2f}" if error is None else _estimate(Estimate(value, error), scale, 2)
