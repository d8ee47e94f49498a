"""Where, when and with what a measurement is taken."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

import alisa
from alisa.engine.threads import is_fixed
from alisa.machine import Cpu, huge_pages, huge_pages_asked, num_cpus, spinning
from alisa.records.schema import Stamp


def current_stamp() -> Stamp:
    """The circumstances as they are."""
    return Stamp(
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
