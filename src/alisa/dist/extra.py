"""Ray comes with an extra, and is imported when somebody asks for many machines."""

from __future__ import annotations

import os
from types import ModuleType

from alisa.errors import InputError


def load_ray() -> ModuleType:
    """Ray, which then sends nothing about its use to anybody.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # CPU jobs keep what the machine shows of its GPUs; Ray warns at every start until it is told.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InputError(f"--ray needs {error.name}, which is not installed; pip install 'alisa[ray]'.") from error
    return ray
