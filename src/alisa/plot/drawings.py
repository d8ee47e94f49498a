"""Which records become which figure. A new figure is one file with one function, and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from alisa.plot.accuracy import draw_accuracy
from alisa.plot.attention import draw_attention
from alisa.plot.recall_map import draw_recall_map, has_depths
from alisa.plot.records import Record
from alisa.plot.steps import draw_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawing(NamedTuple):
    """A figure and the records it is made of."""

    name: str
    takes: Callable[[Record], bool]
    draw: Callable[[Sequence[Record]], Figure]


DRAWINGS = (
    Drawing("accuracy", lambda record: record["kind"] in ("ppl", "qa", "recall"), draw_accuracy),
    Drawing("recall-map", lambda record: record["kind"] == "recall" and has_depths(record), draw_recall_map),
    Drawing("steps", lambda record: record["kind"] == "step", draw_steps),
    Drawing("attention", lambda record: record["kind"] == "sparsity", draw_attention),
)
