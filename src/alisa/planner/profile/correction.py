"""What the parts of a step cost among each other, against what they cost alone.

In a step the caches are cold, other parts use the same cores and memory, and there is an interpreter between the calls.
So a few whole steps are measured as well, and the prices are scaled until they give those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import NamedTuple, TypeVar

from alisa.planner.cost import StepCost
from alisa.planner.hardware import Attention, Gemm, Hardware, Link, SelectionPrices, interpolate
from alisa.planner.profile.clock import fit

T = TypeVar("T", Attention, SelectionPrices)


@dataclass(frozen=True, slots=True)
class Observation:
    """One kind of decode step: what it should have cost by the parts alone, and what it did."""

    num_layers: int
    batch: int
    chooser: str
    """Which of `Hardware.selection` it was priced with."""
    tiers: bool
    """Whether there were tiers below the device."""
    waits: float
    """Times that a layer has to wait for rows."""
    predicted: StepCost
    linear_s: float
    attention_s: float
    selection_s: float
    transfer_s: float
    other_s: float


def corrected(hardware: Hardware, dtype: str, observed: Sequence[Observation]) -> Hardware:
    """The machine with prices that give these steps.

    Args:
        hardware: parts, measured alone.
        dtype: what the model of the observed steps computes in; only its products are corrected.
        observed: steps without tiers of several batch sizes, and steps with tiers.
    """
    whole = [step for step in observed if not step.tiers]
    parted = [step for step in observed if step.tiers]
    call_s, times = _line(whole, lambda step: (step.predicted.attention_s, step.attention_s))
    attention = {
        name: replace(_scaled(prices, times), call_s=prices.call_s * times + call_s)
        for name, prices in hardware.attention.items()
    }
    selection = dict(hardware.selection)
    for name, prices in hardware.selection.items():
        steps = [step for step in whole if step.chooser == name]
        if steps:
            more_s, factor = _line(steps, lambda step: (step.predicted.selection_s, step.selection_s))
            selection[name] = replace(_scaled(prices, factor), call_s=prices.call_s * factor + more_s)
    ratios = _ratios(whole)
    usual = median(ratio for _, ratio in ratios)
    moving = _moving(parted, hardware.read, call_s, times)
    return replace(
        hardware,
        gemm={**hardware.gemm, dtype: _products(hardware.gemm[dtype], ratios)},
        attention=attention,
        selection=selection,
        read=replace(_slower(hardware.read, moving.row), call_s=moving.call_s),
        lookup_call_s=hardware.lookup_call_s * moving.lookup,
        lookup_row_s=hardware.lookup_row_s * moving.lookup,
        place_s=hardware.place_s * moving.lookup,
        rebuild_call_s=hardware.rebuild_call_s * moving.row,
        rebuild_row_s=hardware.rebuild_row_s * moving.row,
        layer_s=hardware.layer_s * usual,
        rope_s=hardware.rope_s * usual,
        value_s=hardware.value_s * usual,
        step_s=median(step.other_s + step.transfer_s for step in whole),
        write_overlap=max(1 - moving.store, 0.0),
    )


class _Moving(NamedTuple):
    """Times as slow as alone, apart from `call_s`."""

    lookup: float
    call_s: float
    """Seconds for each time that a layer waits for rows."""
    row: float
    store: float
    """Of storing, the share that is waited for."""


def _moving(steps: Sequence[Observation], read: Link, call_s: float, times: float) -> _Moving:
    """What tiers cost: all that attention takes longer over rows that have just come counts as moving them."""
    amounts: list[tuple[float, ...]] = []
    took: list[float] = []
    for step in steps:
        said = step.predicted
        waits = step.num_layers * step.waits
        rows_s = said.fetch_s + said.rebuild_s - waits * read.call_s
        amounts.append((said.lookup_s, waits, max(rows_s, 0.0), said.store_s))
        attention_s = said.attention_s * times + step.num_layers * call_s
        took.append(step.transfer_s + max(step.attention_s - attention_s, 0.0))
    return _Moving(*fit(amounts, took))


def _line(steps: Iterable[Observation], pair: Callable[[Observation], tuple[float, float]]) -> tuple[float, float]:
    """(seconds more for each layer, times as slow), from (predicted, measured) of every step."""
    pairs = [(float(step.num_layers), *pair(step)) for step in steps]
    more_s, factor = fit([(layers, predicted) for layers, predicted, _ in pairs], [took for _, _, took in pairs])
    return more_s, factor


def _scaled(prices: T, factor: float) -> T:
    """The same with every price times `factor`."""
    return replace(prices, **{field.name: getattr(prices, field.name) * factor for field in fields(prices)})


def _slower(link: Link, factor: float) -> Link:
    return replace(link, row_s=link.row_s * factor, bytes_per_s=link.bytes_per_s / max(factor, 1e-9))


def _ratios(steps: Iterable[Observation]) -> tuple[tuple[float, float], ...]:
    """(batch, times as slow as the linear layers alone), ascending."""
    by_batch: dict[int, list[float]] = {}
    for step in steps:
        by_batch.setdefault(step.batch, []).append(step.linear_s / step.predicted.linear_s)
    return tuple((float(batch), median(found)) for batch, found in sorted(by_batch.items()))


def _products(gemm: Gemm, ratios: tuple[tuple[float, float], ...]) -> Gemm:
    """Products as slow as in the steps, by number of rows."""
    last = ratios[-1][0]
    curves = tuple(
        (size, tuple((rows, taken * interpolate(ratios, min(rows, last))) for rows, taken in points))
        for size, points in gemm.curves
    )
    return replace(gemm, curves=curves)
