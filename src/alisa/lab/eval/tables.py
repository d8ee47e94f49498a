"""Records as tables for people: one row for each policy and row format, one column for each sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from alisa.records.schema import EvalRecord


class TextTable(NamedTuple):
    """Cells as text; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_TITLES = {
    "ppl": "perplexity over that of dense attention, ± standard error",
    "qa": "accuracy, and percentage points against dense, ± standard error",
    "recall": "accuracy, and percentage points against dense, ± standard error",
    "generation": "4-grams repeated, and percentage points against dense, ± standard error",
    "sparsity": "share of the dense attention weight on the tokens read, ± standard error",
}


def tables(records: Sequence[EvalRecord]) -> list[TextTable]:
    """One table for each kind, model and task, in the order in which they appear."""
    groups: dict[tuple[str, str, str], list[EvalRecord]] = {}
    for record in records:
        groups.setdefault((record.kind, record.model, record.task), []).append(record)
    return [_table(*names, group) for names, group in groups.items()]


def _table(kind: str, model: str, task: str, records: Sequence[EvalRecord]) -> TextTable:
    sparsities = sorted({record.sparsity for record in records if record.policy != "dense"})
    rows = []
    for name, row in _rows(records).items():
        by_sparsity = {record.sparsity: record for record in row}
        if name.startswith("dense,"):
            level = _level(kind, row[0]) if row[0].versus_dense in (0, 1) else _cell(kind, row[0])
            rows.append((name, level, *("" for _ in sparsities)))
        else:
            cells = [_cell(kind, by_sparsity[s]) if s in by_sparsity else "" for s in sparsities]
            rows.append((name, "", *cells))
    header = ("", "level", *(f"{sparsity:g}" for sparsity in sparsities))
    return TextTable(f"{task}, {model}: {_TITLES[kind]}", header, tuple(rows))


def _rows(records: Iterable[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """Records by the name of their row."""
    rows: dict[str, list[EvalRecord]] = {}
    for record in records:
        budgets = "" if record.layers is None else ", budgets"
        rows.setdefault(f"{record.policy}, {record.kv_dtype}{budgets}", []).append(record)
    return rows


def _level(kind: str, record: EvalRecord) -> str:
    value = record.value
    return f"{value:.3f}" if kind == "ppl" else f"{value:.1%}"


def _cell(kind: str, record: EvalRecord) -> str:
    value, versus = record.value, record.versus_dense
    error = record.versus_dense_error
    match kind:
        case "ppl":
            return f"{versus:.4f}" + ("" if error is None else f" ± {error:.4f}")
        case "sparsity":
            return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")
        case _:
            return f"{value:.1%} ({100 * versus:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + ")"
