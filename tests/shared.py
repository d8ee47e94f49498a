"""Real text and models that lie beside the project, not in it; tests that want them skip with a reason where they are
absent."""

import os
from pathlib import Path

import pytest


def shared_root():
    """ALISA_SHARED, by default the folder `shared` beside the checkout; it may be missing."""
    return Path(os.environ.get("ALISA_SHARED", Path(__file__).parents[2] / "shared"))


def shared_path(relative):
    """A path below `shared_root`."""
    path = shared_root() / relative
    if not path.exists():
        pytest.skip(f"{relative} is not there; set ALISA_SHARED to the folder that holds it")
    return path


def stories260k():
    """Directory of the small trained LLaMA checkpoint."""
    return shared_path("models/stories260K")
