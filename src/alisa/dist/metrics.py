"""The metrics of all engines of a fleet as one text for Prometheus; the label `engine` says whose each sample is.

Engines tell them to the front every two seconds: whoever asks it gets an answer while every engine is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import monotonic

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

TELL_S = 2.0
"""How often an engine tells its metrics."""

FORGET_S = 5 * TELL_S
"""An engine that has told nothing for this long is not there any more."""


class MetricsBoard:
    """What every engine has told last; only the loop of the front touches it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[float, bytes]] = {}

    def put(self, engine: str, exposition: bytes) -> None:
        """The metrics of an engine are these now."""
        self._told[engine] = self._clock(), exposition

    def newest(self) -> tuple[bytes, ...]:
        """The metrics of every engine that is there."""
        oldest = self._clock() - FORGET_S
        self._told = {engine: told for engine, told in self._told.items() if told[0] >= oldest}
        return tuple(exposition for _, exposition in self._told.values())


def joined(expositions: Sequence[bytes]) -> bytes:
    """One exposition with the samples of all, in Prometheus' text format.

    Args:
        expositions: of the engines, whose labels differ.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Joined(expositions))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, expositions: Sequence[bytes]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        yield GaugeMetricFamily("alisa:num_engines", "Engines of the fleet that answer.", len(self._expositions))
        families: dict[str, Metric] = {}
        for exposition in self._expositions:
            for family in text_string_to_metric_families(exposition.decode()):
                if known := families.get(family.name):
                    known.samples.extend(family.samples)
                else:
                    families[family.name] = family
        yield from families.values()
