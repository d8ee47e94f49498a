"""Predicted against measured: a point for each configuration, and where the time was expected and found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import colour, grid, marker, new_figure
from alisa.lab.plot.records import number
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_prediction(records: Sequence[Record]) -> Figure:
    """Mean decode steps in milliseconds; the band is 15 % to either side."""
    figure = new_figure(4.6, 4.2)
    (axes,) = grid(figure, 1, 1)
    kinds = list(dict.fromkeys(f"{record['policy']}, {record['placement']}" for record in records))
    times = [number(record, name) for record in records for name in ("measured_ms", "predicted_ms")]
    ends = [min(times) / 1.3, max(times) * 1.3]
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    axes.fill_between(ends, [0.85 * end for end in ends], [1.15 * end for end in ends], color="0.9", zorder=0)
    for kind in kinds:
        found = [record for record in records if f"{record['policy']}, {record['placement']}" == kind]
        axes.plot(
            [number(record, "measured_ms") for record in found],
            [number(record, "predicted_ms") for record in found],
            label=kind,
            color=colour(kind, kinds),
            marker=marker(kind, kinds),
            linestyle="",
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("measured step, ms", fontsize=8)
    axes.set_ylabel("predicted step, ms", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False)
    return figure
