"""How far back a policy still finds things: share recalled by the distance to where it was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import colour, grid, legend_below, marker, new_figure
from alisa.lab.plot.records import grouped, table
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COPIED = "copy"
"""The task whose targets are tokens, half of which follow from the one before: it would hide what is forgotten."""


def draw_recall_distance(records: Sequence[Record]) -> Figure:
    """All tasks with questions and all lengths together; one panel for each model, row format and sparsity."""
    figure = new_figure(4.2, 3.2)
    names = list(dict.fromkeys(str(record["policy"]) for record in records))
    panels = {
        (*key, sparsity): [record for record in found if record["policy"] == "dense"] + chosen
        for key, found in grouped(records, "model", "kv_dtype").items()
        for (sparsity,), chosen in grouped([r for r in found if r["policy"] != "dense"], "sparsity").items()
    }
    for axes, ((model, kv_dtype, sparsity), found) in zip(grid(figure, len(panels), 3), panels.items(), strict=True):
        _panel(axes, found, names)
        axes.set_title(f"{model}, {kv_dtype} rows, sparsity {float(sparsity):g}", fontsize=9)
    legend_below(figure, len(panels))
    return figure


def has_distances(record: Record) -> bool:
    """Whether a record can be part of this figure."""
    return bool(table(record, "by_distance")) and str(record["task"]).split()[0] != _COPIED


def _panel(axes: Axes, records: Sequence[Record], names: list[str]) -> None:
    ends = sorted({end for record in records for end, _, _ in table(record, "by_distance")})
    for (name,), found in grouped(records, "policy").items():
        rows = [row for record in found for row in table(record, "by_distance")]
        points = [(ends.index(end), _share([row for row in rows if row[0] == end])) for end in ends]
        axes.plot(
            *zip(*[(place, share) for place, share in points if share is not None], strict=True),
            label=name,
            markersize=3.5,
            linewidth=2.4 if name == "dense" else 1.2,
            alpha=0.5 if name == "dense" else 1.0,  # the lines of what forgets nothing lie on it
            color=colour(name, names),
            marker=marker(name, names),
        )
    axes.set_xticks(range(len(ends)), [f"to {end:g}" for end in ends])
    axes.set_xlabel("tokens back", fontsize=8)
    axes.set_ylabel("recalled, %", fontsize=8)
    axes.set_ylim(-4, 104)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _share(rows: Sequence[Sequence[float]]) -> float | None:
    """Per cent right over rows of (class, share, number); None where there are none."""
    total = sum(count for _, _, count in rows)
    return 100 * sum(share * count for _, share, count in rows) / total if total else None
