"""Which records become which figure. A new figure is one file with one function, and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from alisa.lab.plot.accuracy import draw_accuracy
from alisa.lab.plot.attention import draw_attention
from alisa.lab.plot.plan import draw_plan
from alisa.lab.plot.prediction import draw_prediction
from alisa.lab.plot.ratios import draw_ratios
from alisa.lab.plot.recall_distance import draw_recall_distance, has_distances
from alisa.lab.plot.recall_map import draw_recall_map, has_depths
from alisa.lab.plot.steps import draw_steps
from alisa.records.jsonl import Record

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


def _is_recall_distance(record: Record) -> bool:
    return record["kind"] == "recall" and has_distances(record)


def _is_step(record: Record) -> bool:
    return record["kind"] == "step"


def _is_attention(record: Record) -> bool:
    return record["kind"] == "sparsity"


def _is_plan(record: Record) -> bool:
    return record["kind"] == "plan"


def _is_prediction(record: Record) -> bool:
    return record["kind"] == "prediction"


def _is_ratios(record: Record) -> bool:
    return record["kind"] == "ratios"


DRAWINGS = (
    Drawing("accuracy", _is_accuracy, draw_accuracy),
    Drawing("recall-map", _is_recall_map, draw_recall_map),
    Drawing("recall-distance", _is_recall_distance, draw_recall_distance),
    Drawing("steps", _is_step, draw_steps),
    Drawing("attention", _is_attention, draw_attention),
    Drawing("plan", _is_plan, draw_plan),
    Drawing("prediction", _is_prediction, draw_prediction),
    Drawing("ratios", _is_ratios, draw_ratios),
)
