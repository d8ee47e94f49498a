"""A plan over its steps: where the rows lie, and what a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import grid, new_figure
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TIERS = (
    ("device_bytes", "device", "#4477aa"),
    ("below_bytes", "below", "#ccbb44"),
    ("deleted_bytes", "deleted", "0.85"),
)


def draw_plan(records: Sequence[Record]) -> Figure:
    """Bytes by tier, and milliseconds, over the tokens generated; one row of panels for each plan."""
    figure = new_figure(4.4, 3.0)
    plans = [record for record in records if record.get("fits")]
    axes = grid(figure, 2 * len(plans), 2)
    for index, record in enumerate(plans):
        steps = [row for row in _rows(record) if row["step"]]
        x = [row["step"] for row in steps]
        memory, time = axes[2 * index], axes[2 * index + 1]
        stacks = [[row[name] / 2**30 for row in steps] for name, _, _ in _TIERS]
        memory.stackplot(x, *stacks, labels=[label for _, label, _ in _TIERS], colors=[c for _, _, c in _TIERS])
        memory.set_ylabel("KV, GiB", fontsize=8)
        memory.legend(loc="upper left", fontsize=7, frameon=False)
        time.plot(x, [row["seconds"] * 1e3 for row in steps], color="#4477aa", linewidth=1.2)
        time.set_ylim(bottom=0)
        time.set_ylabel("step, ms", fontsize=8)
        for panel in (memory, time):
            panel.set_title(f"{record['model']} on {record['hardware']}, batch {record['batch']}", fontsize=8)
            panel.set_xlabel("token", fontsize=8)
            panel.tick_params(labelsize=8)
            panel.grid(alpha=0.25)
    return figure


def _rows(record: Record) -> list[Mapping[str, float]]:
    rows = record.get("memory")
    return rows if isinstance(rows, list) else []
