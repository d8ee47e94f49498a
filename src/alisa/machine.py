"""What this machine is, read from the operating system: processor, memory, limits, disks. No torch.

The doctor shows it, and every benchmark record carries it. What the system does not say is None; nothing here raises.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ASK_FOR_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Set to 1, this environment variable makes torch ask the kernel for huge pages (c10/core/impl/alloc_cpu.cpp).

Importing alisa sets it, unless it is set already.
"""

SPIN_COUNT = "GOMP_SPINCOUNT"
"""Rounds that a waiting thread of libgomp spins before it sleeps; read when torch is loaded.

Importing alisa sets it, unless it or OMP_WAIT_POLICY is set already.
"""

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor as /proc/cpuinfo describes it."""

    name: str
    flags: frozenset[str]
    """Instruction sets and other features, as Linux spells them."""

    @classmethod
    def read(cls) -> Cpu:
        """The first processor of this machine."""
        return cls.parse(_text(Path("/proc/cpuinfo")))

    @classmethod
    def parse(cls, cpuinfo: str) -> Cpu:
        """The first processor in the text of /proc/cpuinfo; ARM's has features, but often no name."""
        fields: dict[str, str] = {}
        for line in cpuinfo.splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        name = fields.get("model name") or platform.processor() or platform.machine()
        return cls(name, frozenset(fields.get("flags", fields.get("Features", "")).split()))


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that files may be written to, and what lies under it."""

    path: str
    kind: str | None
    """File system, such as ext4; a tmpfs is RAM."""
    free_bytes: int | None
    """None: the directory is not there."""
    writable: bool

    @classmethod
    def read(cls, path: Path) -> Place:
        """The directory at `path`."""
        if not path.is_dir():
            return cls(str(path), None, None, writable=False)
        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
        kind = file_system(path.resolve(), mounts)
        return cls(str(path), kind, shutil.disk_usage(path).free, writable=os.access(path, os.W_OK | os.X_OK))

    @property
    def is_ram(self) -> bool:
        """Whether what is written there takes memory instead of disk."""
        return self.kind in ("tmpfs", "ramfs")


def file_system(path: Path, mounts: Sequence[tuple[str, str]]) -> str | None:
    """The file system that holds `path`; of mounts (point, kind) at the same point the last one covers the others."""
    holding = [(len(point), number) for number, (point, _) in enumerate(mounts) if path.is_relative_to(point)]
    return mounts[max(holding)[1]][1] if holding else None


def huge_pages(setting: Path = _HUGE_PAGES) -> str | None:
    """When the kernel backs memory with transparent huge pages: `always`, `madvise` (when asked) or `never`."""
    chosen = re.search(r"\[(\w+)\]", _text(setting))
    return chosen.group(1) if chosen else None


def huge_pages_asked() -> bool:
    """Whether torch was told to ask for huge pages, which matters where the kernel's answer is `madvise`."""
    return os.environ.get(ASK_FOR_HUGE_PAGES) == "1"


def memory_limit(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> int | None:
    """Bytes that this process and its container may use together; None where only the machine is the limit."""
    texts = _cgroup_texts("memory", "memory.max", "memory.limit_in_bytes", own, root)
    limits = [int(text) for text in texts if text.isdecimal()]
    # Version 1 writes "no limit" as a huge number.
    return min((limit for limit in limits if limit < psutil.virtual_memory().total), default=None)


def free_memory() -> int:
    """Bytes that this process can still take: what the machine has left, and no more than its container allows."""
    free = psutil.virtual_memory().available
    limit = memory_limit()
    return free if limit is None else max(0, min(free, limit - psutil.Process().memory_info().rss))


def num_cpus(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> float:
    """Processors that this process may keep busy: those it is bound to, or a container's quota if that is less."""
    quotas = [float(len(os.sched_getaffinity(0)))]
    for text in _cgroup_texts("cpu", "cpu.max", "cpu.cfs_quota_us", own, root):
        quota, *period = text.split()
        if quota.isdecimal():  # neither "max" nor "-1"
            # Version 1 keeps the period, which nobody changes from 100 ms, in a file of its own.
            quotas.append(int(quota) / int(period[0] if period else 100_000))
    return min(quotas)


def other_cpu_seconds() -> float:
    """Processor seconds since the machine started, without those of this process and of its children that have ended.

    The system counts in steps of 10 ms.
    """
    times = psutil.cpu_times()._asdict()
    # A guest's time is counted in user too; waiting for a disk keeps no processor busy.
    idle = ("idle", "iowait", "guest", "guest_nice")
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return sum(value for kind, value in times.items() if kind not in idle) - own_s


def spinning() -> str:
    """How long torch's threads spin when they wait for each other, as far as the environment says."""
    for name in ("OMP_WAIT_POLICY", SPIN_COUNT):
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    return "as long as the OpenMP runtime likes"


def _cgroup_texts(controller: str, name: str, old_name: str, own: Path, root: Path) -> Iterator[str]:
    """A setting of every control group around this process, from its own outwards, in version 2 or version 1."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, file = root, name
        elif controller in controllers.split(","):
            base, file = root / controller, old_name
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base) and (text := _text(folder / file).strip()):
                yield text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
