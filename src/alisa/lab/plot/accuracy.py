"""What each policy costs against dense attention, by sparsity: one panel for each model, task and row format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import colour, grid, legend_below, marker, new_figure
from alisa.lab.plot.records import grouped, number
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_accuracy(records: Sequence[Record]) -> Figure:
    """Perplexity lost in per cent, or accuracy lost in points, with standard errors."""
    figure = new_figure(4.2, 3.2)
    names = list(dict.fromkeys(str(record["policy"]) for record in records if record["policy"] != "dense"))
    panels = grouped(records, "model", "kind", "task", "kv_dtype")
    panels = {key: found for key, found in panels.items() if any(record["policy"] != "dense" for record in found)}
    for axes, ((model, kind, task, kv_dtype), found) in zip(grid(figure, len(panels), 3), panels.items(), strict=True):
        _panel(axes, kind, found, names)
        axes.set_title(f"{task}, {model}, {kv_dtype} rows", fontsize=9)
    legend_below(figure, len(panels))
    return figure


def _panel(axes: Axes, kind: str, records: Sequence[Record], names: list[str]) -> None:
    by_policy = grouped([record for record in records if record["policy"] != "dense"], "policy")
    for (name,), found in by_policy.items():
        found = sorted(found, key=lambda record: number(record, "sparsity"))
        axes.errorbar(
            [number(record, "sparsity") for record in found],
            [100 * _lost(kind, record) for record in found],
            yerr=[100 * number(record, "versus_dense_error") for record in found],
            label=name,
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
            color=colour(name, names),
            marker=marker(name, names),
        )
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("sparsity", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if kind == "ppl":
        # Losses run from a tenth of a per cent to a hundred: linear below half a per cent, logarithmic above.
        axes.set_yscale("symlog", linthresh=0.5)
        axes.set_ylabel("perplexity lost, %", fontsize=8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylabel("accuracy lost, points", fontsize=8)


def _lost(kind: str, record: Record) -> float:
    """Share lost against dense; above 0 is worse."""
    versus = number(record, "versus_dense")
    return versus - 1 if kind == "ppl" else -versus
