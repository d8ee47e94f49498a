"""One line of the doctor's screen; free of torch, because a torch that cannot be imported is a finding too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

REINSTALL = "pip install -v --force-reinstall --no-deps alisa (in a checkout: -e . instead of alisa)"
"""How to install again, and see why building the kernels fails if it does."""


class Status(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """It works, but something is slower or smaller than it could be."""
    PROBLEM = "problem"
    """Something is broken."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's screen."""

    status: Status
    topic: str
    text: str
    way_out: str = ""
    """What to do about it; empty where nothing needs doing."""
