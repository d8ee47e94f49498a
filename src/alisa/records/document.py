"""A file that is one JSON document: schedules, profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alisa.errors import InputError


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """The value that the file holds.

    Raises:
        InputError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
