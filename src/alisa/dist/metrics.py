"""The metrics of all engines of a fleet as one text for Prometheus; the label `engine` says whose each sample is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


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
