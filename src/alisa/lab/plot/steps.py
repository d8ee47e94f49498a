"""What a run did, step by step: memory by tier above, time by part below, and the phases in the background."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from alisa.lab.plot.canvas import grid, new_figure
from alisa.lab.plot.records import number
from alisa.records.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIERS = (("device", "kv_bytes", "#4477aa"), ("host", "host_bytes", "#66ccee"), ("disk", "disk_bytes", "#ccbb44"))
_PARTS = (
    ("linear", "#4477aa"),
    ("attention", "#ee6677"),
    ("selection", "#228833"),
    ("transfer", "#ccbb44"),
    ("sampling", "#66ccee"),
    ("other", "#bbbbbb"),
)
_PHASES = {"device": "#ffffff", "device-host": "#e8eef7", "recompute": "#f9e3d9"}
_NUMERALS = {"device": "I", "device-host": "II", "recompute": "III"}


def draw_steps(records: Sequence[Record]) -> Figure:
    """Memory by tier in MiB and milliseconds by part over the decode steps of one run."""
    steps = [record for record in records if not record.get("prefill")]
    figure = new_figure(7.0, 2.6)
    memory, time = grid(figure, 2, 1)
    at = list(range(len(steps)))
    tiers = [(name, [number(step, field) / 2**20 for step in steps], colour) for name, field, colour in _TIERS]
    tiers = [tier for tier in tiers if any(tier[1])]
    memory.stackplot(at, [values for _, values, _ in tiers], colors=[colour for *_, colour in tiers])
    memory.set_ylabel("KV rows, MiB")
    _label(memory, [(name, colour) for name, _, colour in tiers])
    parts = [(name, [number(step, f"{name}_s") * 1e3 for step in steps], colour) for name, colour in _PARTS]
    time.stackplot(at, [values for _, values, _ in parts], colors=[colour for *_, colour in parts])
    time.set_ylabel("step, ms")
    time.set_xlabel("decode step")
    # A few slow steps, such as the first, must not flatten all others.
    walls = sorted(number(step, "wall_s") * 1e3 for step in steps)
    time.set_ylim(0, 1.3 * walls[int(0.98 * (len(walls) - 1))])
    _label(time, [(name, colour) for name, _, colour in parts])
    for axes in (memory, time):
        axes.set_xlim(0, max(len(steps) - 1, 1))
        axes.grid(alpha=0.25)
        _mark_phases(axes, [str(step.get("phase")) for step in steps])
    return figure


def _label(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """A legend at the side of the axes."""
    for name, colour in entries:
        axes.fill_between([], [], [], color=colour, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _mark_phases(axes: Axes, phases: Sequence[str]) -> None:
    """A numeral where each phase begins, and a line between two."""
    changes = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(phases)) if a != b)]
    for start, end in pairwise([*changes, len(phases)]):
        if start:
            axes.axvline(start, color="0.2", linewidth=0.9, linestyle="--")
        axes.axvspan(start, end, color=_PHASES.get(phases[start], "#ffffff"), zorder=-1, linewidth=0)
        if end - start > len(phases) / 50:
            axes.annotate(
                _NUMERALS.get(phases[start], ""),
                ((start + end) / 2, 0.9),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=9,
            )
