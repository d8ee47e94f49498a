"""The tables of docs/accuracy.md, from the records of `alisa eval`.

    python benchmarks/accuracy_tables.py benchmarks/results/accuracy/*.jsonl

One Markdown table for each model and task: a row for each policy and row format, a column for each sparsity; what it
costs against dense attention with float32 rows, ± the standard error of the difference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read(paths: Iterable[Path]) -> list[Record]:
    """All records, the newest of each cell."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return list({record["cell"]: record for record in map(json.loads, lines)}.values())


def cost(record: Record) -> str:
    """One cell: perplexity or points lost."""
    sign = 1 if record["kind"] == "ppl" else -1
    lost = 100 * (record["versus_dense"] - (record["kind"] == "ppl")) * sign + 0.0  # + 0: no minus zero
    error = record["versus_dense_error"]
    digits = 2 if record["kind"] == "ppl" else 1
    return f"{lost:.{digits}f}" + ("" if error is None else f" ± {100 * error:.{digits}f}")


def level(record: Record) -> str:
    """What dense attention reaches."""
    return f"{record['value']:.2f}" if record["kind"] == "ppl" else f"{record['value']:.1%}".replace("%", " %")


def text_of(record: Record) -> str:
    """What was read, and in windows of how many tokens."""
    return f"{record['task']} {record['settings']['context']}"


def by_sparsity(records: Sequence[Record]) -> list[str]:
    """Rows: policy and row format. Columns: sparsity."""
    sparsities = sorted({record["sparsity"] for record in records if record["policy"] != "dense"})
    lines = ["| policy | rows | " + " | ".join(f"{sparsity:g}" for sparsity in sparsities) + " |"]
    lines.append("|---" * (2 + len(sparsities)) + "|")
    rows: dict[tuple[str, str], dict[float, Record]] = {}
    for record in records:
        rows.setdefault((record["policy"], record["kv_dtype"]), {})[record["sparsity"]] = record
    for (policy, kv_dtype), found in rows.items():
        if policy == "dense" and found[0.0]["versus_dense"] in (0.0, 1.0):
            continue
        cells = [cost(found[0.0])] + [""] * (len(sparsities) - 1) if policy == "dense" else None
        cells = cells or [cost(found[s]) if s in found else "" for s in sparsities]
        lines.append(f"| `{policy}` | {kv_dtype} | " + " | ".join(cells) + " |")
    return lines


def by_task(records: Sequence[Record]) -> list[str]:
    """Rows: policy, row format, sparsity. Columns: tasks."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    lines = ["| policy | rows | sparsity | " + " | ".join(tasks) + " |", "|---" * (3 + len(tasks)) + "|"]
    rows: dict[tuple[str, str, float], dict[str, Record]] = {}
    for record in records:
        rows.setdefault((record["policy"], record["kv_dtype"], record["sparsity"]), {})[record["task"]] = record
    for (policy, kv_dtype, sparsity), found in rows.items():
        base = policy == "dense" and all(record["versus_dense"] == 0 for record in found.values())
        cells = [(level if base else cost)(found[task]) if task in found else "" for task in tasks]
        lines.append(f"| `{policy}` | {kv_dtype} | {sparsity:g} | " + " | ".join(cells) + " |")
    return lines


def study(records: Sequence[Record]) -> list[str]:
    """What each policy makes of dense attention."""
    names = ("value", "spearman", "overlap", "entering", "returning")
    lines = ["| policy | captured | Spearman | overlap | entering a step | returning |", "|---|---|---|---|---|---|"]
    for record in records:
        captured, spearman, overlap, entering, returning = (record[name] for name in names)
        lines.append(
            f"| `{record['policy']}` | {100 * captured:.1f} % | {spearman:.3f} | {100 * overlap:.1f} % "
            f"| {entering:.1f} | {100 * returning:.2f} % |"
        )
    return lines


def distances(records: Sequence[Record]) -> list[str]:
    """Share recalled by the distance between question and fact, over all tasks of one length and more."""
    classes = sorted({end for record in records for end, _, _ in record["by_distance"]})
    lines = ["| policy | rows | sparsity | " + " | ".join(f"to {end:g}" for end in classes) + " |"]
    lines.append("|---" * (3 + len(classes)) + "|")
    rows: dict[tuple[str, str, float], dict[float, list[tuple[float, int]]]] = {}
    for record in records:
        row = rows.setdefault((record["policy"], record["kv_dtype"], record["sparsity"]), {})
        for end, share, count in record["by_distance"]:
            row.setdefault(end, []).append((share, count))
    for (policy, kv_dtype, sparsity), found in rows.items():
        cells = []
        for end in classes:
            pairs = found.get(end, [])
            total = sum(count for _, count in pairs)
            cells.append(f"{100 * sum(share * count for share, count in pairs) / total:.1f}" if total else "")
        lines.append(f"| `{policy}` | {kv_dtype} | {sparsity:g} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print every table there is data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--kind", choices=["ppl", "qa", "recall", "sparsity", "distance"])
    records = read((args := parser.parse_args()).files)
    for kind, draw in (("ppl", by_sparsity), ("qa", by_task), ("recall", by_task), ("sparsity", study)):
        found = [record for record in records if record["kind"] == kind]
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in found:
            groups.setdefault((record["model"], text_of(record) if kind in ("ppl", "sparsity") else ""), []).append(
                record
            )
        for (model, task), group in groups.items() if args.kind in (None, kind) else ():
            print(f"\n{kind} {task} {model}, dense {level(group[0])}\n\n" + "\n".join(draw(group)))
        if kind == "recall" and args.kind in (None, "distance") and found:
            lookups = [record for record in found if record["task"].split()[0] != "copy"]
            print("\nby distance\n\n" + "\n".join(distances(lookups)))


if __name__ == "__main__":
    main()
