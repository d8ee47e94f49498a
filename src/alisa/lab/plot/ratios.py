"""Predicted speed against other systems by batch: one panel for each of them, a line for each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import colour, grid, marker, new_figure
from alisa.lab.plot.records import grouped, number
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("ours_vs_static", "as this library does it, to FlexGen-like", (1.4, 3.0)),
    ("literal_vs_static", "the paper's sum, equation 3 literally, to FlexGen-like", (1.4, 3.0)),
    ("ours_vs_paging", "as this library does it, to vLLM-like", (None, 1.9)),
    ("literal_vs_paging", "the paper's sum, equation 3 literally, to vLLM-like", (None, 1.9)),
)
"""Field, title, and the range that the paper reports."""


def draw_ratios(records: Sequence[Record]) -> Figure:
    """Ratios of speed over the batch size, with the paper's range shaded."""
    figure = new_figure(4.2, 3.0)
    names = list(dict.fromkeys(str(record["model"]) for record in records))
    for axes, (field, title, (low, high)) in zip(grid(figure, len(_PANELS), 2), _PANELS, strict=True):
        axes.axhspan(low or 0.2, high, color="0.9", zorder=0)
        axes.axhline(1, color="0.4", linewidth=0.8)
        for (name,), found in grouped(records, "model").items():
            axes.plot(
                [number(record, "batch") for record in found],
                [number(record, field) for record in found],
                label=name,
                color=colour(name, names),
                marker=marker(name, names),
                markersize=3.5,
                linewidth=1.2,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("batch", fontsize=8)
        axes.set_ylabel("times as fast", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
