"""How sparse attention is and what the policies make of it: a map for the model, bars for the policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import grid, new_figure
from alisa.lab.plot.records import grouped, number, table
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = (
    ("value", "dense weight captured"),
    ("spearman", "Spearman correlation with dense"),
    ("overlap", "read by the step before, too"),
    ("returning", "back after k steps or more"),
)


def draw_attention(records: Sequence[Record]) -> Figure:
    """Weight sparsity by layer and step, then four figures for each policy; a row for each model, text and sparsity."""
    figure = new_figure(3.0, 2.8)
    groups = grouped(records, "model", "task", "kv_dtype")
    sparse = {
        (*key, sparsity): ([record for record in found if record["policy"] == "dense"], chosen)
        for key, found in groups.items()
        for (sparsity,), chosen in grouped([r for r in found if r["policy"] != "dense"], "sparsity").items()
    }
    width = 1 + len(_BARS)
    axes = grid(figure, width * len(sparse), width)
    for row, ((model, task, kv_dtype, sparsity), (dense, chosen)) in enumerate(sparse.items()):
        first, *others = axes[row * width : (row + 1) * width]
        _weights(first, (dense or chosen)[0])
        first.set_title(f"{task}, {model}, {kv_dtype}\nweights below 1 % of the row's largest", fontsize=8)
        for bars, (name, title) in zip(others, _BARS, strict=True):
            _bars(bars, chosen, name)
            bars.set_title(f"{title}\nsparsity {float(sparsity):g}", fontsize=8)
    return figure


def _weights(axes: Axes, record: Record) -> None:
    shares = table(record, "weight_sparsity_by_layer_and_step")
    axes.imshow(shares, vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
    for layer, line in enumerate(shares):
        for step, share in enumerate(line):
            axes.text(step, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color="w")
    axes.set_xlabel("part of the window", fontsize=7)
    axes.set_ylabel("layer", fontsize=7)
    axes.set_yticks(range(len(shares)))
    axes.tick_params(labelsize=7)


def _bars(axes: Axes, records: Sequence[Record], name: str) -> None:
    policies = [str(record["policy"]) for record in records]
    bars = axes.barh(policies, [number(record, name) for record in records], color="#4477aa", height=0.7)
    axes.bar_label(bars, fmt="%.3f", fontsize=6, padding=2)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.tick_params(labelsize=7)
