"""Where the records of a table come from: machine, commits and days, in one line below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Stamp = Mapping[str, Any]
"""`alisa.records.schema.Stamp` as a record has it."""


def provenance(stamps: Iterable[tuple[str, Stamp | None]]) -> str:
    """One sentence for each machine; which lines of the table are its own where there are several.

    Args:
        stamps: (line of the table, stamp of its record) in the order of the table; None where a record has none.
    """
    machines: dict[str | None, list[tuple[str, Stamp]]] = {}
    for line, stamp in stamps:
        place = None
        if stamp is not None:
            place = f"{stamp['num_threads']} threads of {stamp['cpu']}"
        machines.setdefault(place, []).append((line, stamp or {}))
    return " ".join(_sentence(place, found, alone=len(machines) == 1) for place, found in machines.items())


def _sentence(place: str | None, found: list[tuple[str, Stamp]], *, alone: bool) -> str:
    lines = ", ".join(dict.fromkeys(line for line, _ in found))
    whose = "" if alone else f" ({lines})"
    if place is None:
        return f"Machine and commit were not recorded{whose}."
    in_time = sorted((stamp for _, stamp in found), key=lambda stamp: stamp["date"])
    days = _range([stamp["date"][:10] for stamp in in_time])
    commits = [stamp["commit"].removesuffix("-dirty") for stamp in in_time if stamp.get("commit")]
    at = f" at {_range(commits)}" if commits else ""
    return f"Measured {days}{at} on {place}{whose}."


def _range(values: list[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
