"""Whole engines side by side: tokens per second as bars, one panel for each workload, the floor's above each bar."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import colour, grid, new_figure
from alisa.records.schema import Floor, RunFigures, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_runs(records: Sequence[RunRecord]) -> Figure:
    """Medians over the rounds with a line from the slowest to the fastest; a mark where the floor would be."""
    panels: dict[str, dict[str, list[tuple[RunFigures, Floor | None]]]] = {}
    for record in records:
        if record.figures is not None:
            runs = panels.setdefault(record.workload.name, {})
            runs.setdefault(record.run, []).append((record.figures, record.floor))
    names = list(dict.fromkeys(name for runs in panels.values() for name in runs))
    figure = new_figure(5.4, 0.9 + 0.26 * len(names))
    for axes, (workload, runs) in zip(grid(figure, len(panels), 2), panels.items(), strict=True):
        for place, (name, found) in enumerate(runs.items()):
            rates = [figures.tokens_per_s for figures, _ in found]
            axes.barh(place, median(rates), color=colour(name, names), height=0.7)
            axes.plot([min(rates), max(rates)], [place, place], color="0.2", linewidth=1)
            floors = [_floor_rate(figures, floor) for figures, floor in found if floor is not None]
            if floors:
                axes.plot(median(floors), place, marker="|", color="0.2", markersize=11, markeredgewidth=2)
        axes.set_yticks(range(len(runs)), list(runs), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(workload, fontsize=9)
        axes.set_xlabel("tokens per second; | the floor", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.25)
    return figure


def _floor_rate(figures: RunFigures, floor: Floor) -> float:
    """Tokens per second when nothing but the floor's reading and multiplying were done."""
    return figures.tokens_per_s * figures.wall_s / floor.wall_s
