"""Which records become which figure. A new figure is one file with one function, and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from alisa.plot.accuracy import draw_accuracy
from alisa.plot.attention import draw_attention
from alisa.plot.plan import draw_plan
from alisa.plot.prediction import draw_prediction
from alisa.plot.ratios import draw_ratios
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


def _is_accuracy(record: Record) -> bool:
    return record["kind"] in ("ppl", "qa", "recall")


def _is_recall_map(record: Record) -> bool:
    return record["kind"] == "recall" and has_depths(record)


def _is_step(record: Record) -> bool:
    return record["kind"] == "step"


def _is_attention(record: Record) -> bool:
    return record["kind"] == "sparsity"


DRAWINGS = (
<<<<<<< HEAD
    Drawing("accuracy", _is_accuracy, draw_accuracy),
    Drawing("recall-map", _is_recall_map, draw_recall_map),
    Drawing("steps", _is_step, draw_steps),
    Drawing("attention", _is_attention, draw_attention),
=======
    Drawing("accuracy", lambda record: record["kind"] in ("ppl", "qa", "recall"), draw_accuracy),
    Drawing("recall-map", lambda record: record["kind"] == "recall" and has_depths(record), draw_recall_map),
    Drawing("steps", lambda record: record["kind"] == "step", draw_steps),
    Drawing("attention", lambda record: record["kind"] == "sparsity", draw_attention),
    Drawing("plan", lambda record: record["kind"] == "plan", draw_plan),
<<<<<<< HEAD
>>>>>>> decb35c (Price a schedule, search for the best, and say what will happen: alisa plan)
=======
    Drawing("prediction", lambda record: record["kind"] == "prediction", draw_prediction),
    Drawing("ratios", lambda record: record["kind"] == "ratios", draw_ratios),
>>>>>>> 2043daf (wip)
)
