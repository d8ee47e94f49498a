"""Text generation where the KV cache does not fit: sparse window attention, token by token (arXiv 2403.17312).

    from alisa import LLM, SamplingParams

`LLM` is looked up on first use: it brings torch, which `alisa --help` and the planner's arithmetic do without.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alisa.config import SamplingParams
    from alisa.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]

# Where the kernel gives huge pages to those who ask, torch asks if this says so when it first allocates; a step writes
# its rows to fresh memory, and pages of 4 KiB are many to fault in. Set to 0 in the environment, it stays 0. The name
# is also `ASK_FOR_HUGE_PAGES` in alisa.machine, which brings psutil and so is not imported here.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# A thread that waits for others spins. When other programs are busy, the one that is waited for may be without a
# processor: a shorter spin than libgomp's 300,000 rounds then lets it run. It must be set before torch is loaded. The
# name is also `SPIN_COUNT` in alisa.machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {"LLM": "alisa.llm", "SamplingParams": "alisa.config"}


def __getattr__(name: str) -> object:
    """Import the public name `name` from its home module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'alisa' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
