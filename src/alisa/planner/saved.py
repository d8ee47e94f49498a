"""Where the profile of this machine is kept, and whether it still fits."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from alisa import __version__
from alisa.errors import InputError
from alisa.planner.hardware import Hardware
from alisa.policy.registry import POLICIES
from alisa.records.document import read_json
from alisa.records.structure import structure


def machine_stamp() -> dict[str, str | int | None]:
    """What a profile depends on; a profile with another stamp is not used."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": metadata.version("torch"),
        "alisa": __version__,
    }


def profile_path() -> Path:
    """The file of this user, as the XDG base directories say.

    Raises:
        InputError: this user has no home directory.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError("This user has no home directory; set XDG_CACHE_HOME, or name a file.") from error
    return Path(base) / "alisa" / "profile.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRecord:
    """What a file of a profile holds."""

    kind: Literal["profile"] = "profile"
    stamp: dict[str, str | int | None]
    date: str
    hardware: Hardware


def save_profile(hardware: Hardware, date: str, path: Path | None = None) -> Path:
    """Write a profile with the stamp of this machine; returns where.

    Raises:
        InputError: the file cannot be written, or none is named and this user has no home directory.
    """
    path = path or profile_path()
    record = ProfileRecord(stamp=machine_stamp(), date=date, hardware=hardware)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def load_profile(path: Path | None = None) -> Hardware | None:
    """The saved profile of this machine; None when there is none, or one with another stamp or too few prices."""
    try:
        record = structure(ProfileRecord, read_json(path or profile_path()))
    except InputError:
        return None
    return record.hardware if record.stamp == machine_stamp() and not _unpriced(record.hardware) else None


def load_hardware(path: Path) -> Hardware:
    """The machine that a file describes: a profile with its stamp, or the machine alone.

    Raises:
        InputError: the file is missing, not such a description, or lacks the prices of a policy.
    """
    values = read_json(path)
    try:
        is_profile = isinstance(values, dict) and values.get("kind") == "profile"
        hardware = structure(ProfileRecord, values).hardware if is_profile else structure(Hardware, values)
    except InputError as error:
        raise InputError(
            f"{path} does not describe a machine ({error}); `alisa profile --output` writes one."
        ) from error
    if missing := _unpriced(hardware):
        raise InputError(
            f"{path} has no prices of {', '.join(missing)} under `selection`; `alisa profile --output` writes them."
        )
    return hardware


def _unpriced(hardware: Hardware) -> list[str]:
    """Kinds of selection that policies are priced as, and that this machine has no prices of."""
    return sorted({entry.priced_as for entry in POLICIES.values()} - hardware.selection.keys())


def _cpu_name() -> str:
    """As the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
