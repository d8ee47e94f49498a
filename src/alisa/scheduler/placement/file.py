"""Schedules as files: what `--schedule FILE` reads and the planner writes.

{"schedule": "three-phase", "offload_from": 76, "recompute_from": 300, "offload_ratio": 0.5, "recompute_ratio": 0.2}
{"schedule": "static", "offload_ratio": 0.75}
{"schedule": "all-device"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from alisa.errors import InputError
from alisa.records.document import read_json
from alisa.scheduler.placement.all_device import AllDevice
from alisa.scheduler.placement.base import PlacementPolicy
from alisa.scheduler.placement.static import StaticSplit
from alisa.scheduler.placement.three_phase import Schedule, ThreePhase


def load_schedule(path: Path) -> PlacementPolicy:
    """The placement policy that a file describes.

    Raises:
        InputError: the file is missing or not such a description.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds a {type(values).__name__} instead of a schedule; `alisa plan --save` writes one."
        )
    try:
        return schedule_from(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def schedule_from(values: Mapping[str, Any]) -> PlacementPolicy:
    """The placement policy that these values describe.

    Raises:
        InputError: something is missing, unknown or out of range.
    """
    name, rest = values.get("schedule"), {key: value for key, value in values.items() if key != "schedule"}
    if name == "all-device":
        _check(rest, set())
        return AllDevice()
    if name == "static":
        _check(rest, {"offload_ratio"})
        ratio = float(rest["offload_ratio"])
        if not 0 <= ratio < 1:
            raise InputError(f"offload_ratio is {ratio}, allowed is 0 up to but not 1.")
        return StaticSplit(ratio)
    if name == "three-phase":
        if not rest:
            return ThreePhase()
        _check(rest, {field.name for field in fields(Schedule)})
        return ThreePhase(Schedule(**rest))
    raise InputError(f"schedule {name!r} is unknown, there is all-device, static, three-phase.")


def schedule_values(placement: PlacementPolicy) -> dict[str, Any]:
    """What `schedule_from` makes the same placement policy of."""
    match placement:
        case StaticSplit():
            return {"schedule": placement.name, "offload_ratio": placement.offload_ratio}
        case ThreePhase(schedule=Schedule() as schedule):
            return {"schedule": placement.name, **asdict(schedule)}
        case _:
            return {"schedule": placement.name}


def _check(values: Mapping[str, Any], wanted: set[str]) -> None:
    """Raise InputError unless there is a number under each of these names and nothing else."""
    missing, unknown = sorted(wanted - set(values)), sorted(set(values) - wanted)
    bad = sorted(key for key in wanted & set(values) if type(values[key]) not in (int, float))
    problems = [
        f"{what} {', '.join(names)}"
        for what, names in (("it lacks", missing), ("it does not know", unknown), ("no number is", bad))
        if names
    ]
    if problems:
        raise InputError(
            f"a schedule is described by {', '.join(sorted(wanted)) or 'its name alone'}; {'; '.join(problems)}."
        )
