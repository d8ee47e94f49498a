"""Where, when and with what a measurement was taken: a record without this cannot be compared with another."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

import alisa
from alisa.engine.threads import is_fixed
from alisa.machine import Cpu, huge_pages, huge_pages_asked, num_cpus, spinning


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The circumstances of one benchmark run."""

    date: str
    """UTC, to the second."""
    commit: str | None
    """Of the checkout that ran; ends in -dirty when files differed from it. None for an installed package."""
    alisa: str
    torch: str
    python: str
    cpu: str
    cpu_capability: str
    """What torch makes of the processor."""
    num_cpus: float
    """That the process may keep busy."""
    num_threads: int
    """That torch uses."""
    spinning: str
    """How long threads spin that wait for each other."""
    threads_fixed: bool
    """Whether the user fixed the threads, so that they do not follow the load."""
    memory_bytes: int
    huge_pages: str | None
    """The kernel's setting: `always`, `madvise` or `never`."""
    huge_pages_asked: bool
    """Whether torch was told to ask for them."""

    @classmethod
    def now(cls) -> Stamp:
        """The circumstances as they are."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=checkout_commit(Path(alisa.__file__).parent),
            alisa=alisa.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            cpu=Cpu.read().name,
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            num_cpus=num_cpus(),
            num_threads=torch.get_num_threads(),
            spinning=spinning(),
            threads_fixed=is_fixed(),
            memory_bytes=psutil.virtual_memory().total,
            huge_pages=huge_pages(),
            huge_pages_asked=huge_pages_asked(),
        )


def checkout_commit(package: Path) -> str | None:
    """The commit of the git checkout that `package` belongs to; None where it only lies inside somebody's checkout."""
    tracked = _git(package, "ls-files", "__init__.py")
    return _git(package, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") if tracked else None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
