"""The last line of every benchmark here: one JSON record, printed, and kept where the user wants it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def tell(record: Mapping[str, object], path: Path | None) -> None:
    """Print the record, and append it to a file; None: nobody keeps it."""
    line = json.dumps(record, allow_nan=False, default=str)  # a path is its text
    print(line)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
