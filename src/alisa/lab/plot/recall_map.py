"""Where a policy still finds things: depth in the text against its length, one map for each policy and sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import grid, new_figure
from alisa.lab.plot.records import grouped, number, table
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_recall_map(records: Sequence[Record]) -> Figure:
    """Share recalled at every length and depth, for the tasks that have depths."""
    figure = new_figure(2.3, 2.3)
    maps = grouped([{**record, "name": str(record["task"]).split()[0]} for record in records], *_FIELDS)
    cells = list(zip(grid(figure, len(maps), 5), maps.items(), strict=True))
    for axes, ((_, name, policy, sparsity, _), found) in cells:
        _map(axes, found)
        axes.set_title(f"{name}: {policy}" + ("" if policy == "dense" else f" {float(sparsity):g}"), fontsize=8)
    figure.supxlabel("tokens in the text", fontsize=8)
    figure.supylabel("depth of what is asked for", fontsize=8)
    return figure


def has_depths(record: Record) -> bool:
    """Whether a record can be part of a map."""
    return bool(table(record, "by_depth"))


_FIELDS = ("model", "name", "policy", "sparsity", "kv_dtype")


def _map(axes: Axes, records: Sequence[Record]) -> None:
    records = sorted(records, key=lambda record: number(record, "length"))
    depths = [depth for depth, _, _ in table(records[0], "by_depth")]
    shares = [[share for _, share, _ in table(record, "by_depth")] for record in records]
    by_depth = [[column[row] for column in shares] for row in range(len(depths))]
    axes.imshow(by_depth, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, line in enumerate(by_depth):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=6)
    axes.set_xticks(range(len(records)), [f"{number(record, 'length'):g}" for record in records], fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
