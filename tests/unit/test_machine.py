"""What the operating system says, read from files that a test can write."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from alisa import machine
from alisa.machine import ASK_FOR_HUGE_PAGES, Cpu, Place

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: B\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\n"


def test_the_first_processor_counts():
    assert Cpu.parse(X86) == Cpu("Some CPU @ 2GHz", frozenset({"fpu", "avx2", "avx512f"}))


def test_arm_has_features_and_no_name():
    cpu = Cpu.parse(ARM)
    assert cpu.flags == {"fp", "asimd", "bf16"}
    assert cpu.name
    assert Cpu.parse("").flags == frozenset()


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/tmp/x", "tmpfs"), ("/tmpfile", "ext4"), ("/home/me", "xfs"), ("/data", "btrfs"), ("relative", None)],
)
def test_the_deepest_mount_holds_a_path_and_the_last_of_two_covers_the_first(path, kind):
    mounts = [("/", "ext4"), ("/tmp", "tmpfs"), ("/home", "ext3"), ("/home", "xfs"), ("/data", "btrfs")]
    assert machine.file_system(Path(path), mounts) == kind


def test_a_place_is_looked_at(tmp_path):
    place = Place.read(tmp_path)
    assert place.writable
    assert place.free_bytes > 0
    assert place.kind
    missing = Place.read(tmp_path / "missing")
    assert (missing.kind, missing.free_bytes, missing.writable) == (None, None, False)
    assert Place("/x", "tmpfs", 1, True).is_ram
    assert not Place("/x", "ext4", 1, True).is_ram


def test_huge_pages(tmp_path):
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    assert machine.huge_pages(setting) == "madvise"
    assert machine.huge_pages(tmp_path / "missing") is None


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def cgroup(tmp_path):
    """The two places that are read: whose group this process is, and where the groups are."""
    return tmp_path / "own", tmp_path / "root"


def test_limits_of_version_2_are_the_tightest_on_the_way_up(cgroup):
    own, root = cgroup
    write(own, "0::/outer/inner\n")
    write(root / "outer/inner/memory.max", "max\n")
    write(root / "outer/memory.max", "1000000\n")
    write(root / "outer/inner/cpu.max", "max 100000\n")
    write(root / "outer/cpu.max", "50000 200000\n")
    assert machine.memory_limit(own, root) == 1_000_000
    assert machine.num_cpus(own, root) == 0.25


def test_limits_of_version_1(cgroup):
    own, root = cgroup
    write(own, "4:memory:/here\n3:cpuacct,cpu:/here\n0::/\n")
    write(root / "memory/here/memory.limit_in_bytes", "2000000\n")
    write(root / "cpu/here/cpu.cfs_quota_us", "50000\n")
    assert machine.memory_limit(own, root) == 2_000_000
    assert machine.num_cpus(own, root) == 0.5


def test_no_limit(cgroup):
    own, root = cgroup
    write(own, "4:memory:/\n3:cpu:/\n")
    write(root / "memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    write(root / "cpu/cpu.cfs_quota_us", "-1\n")
    for files in (cgroup, (own / "missing", root)):
        assert machine.memory_limit(*files) is None
        assert machine.num_cpus(*files) >= 1


def test_a_containers_limit_bounds_the_free_memory(monkeypatch):
    used = psutil.Process().memory_info().rss
    monkeypatch.setattr(machine, "memory_limit", lambda: used + 10**6)
    assert machine.free_memory() < 10**7
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    assert machine.free_memory() > 10**7


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_importing_asks_for_huge_pages_unless_told_otherwise(before, after):
    environment = {name: value for name, value in os.environ.items() if name != ASK_FOR_HUGE_PAGES}
    environment |= {} if before is None else {ASK_FOR_HUGE_PAGES: before}
    program = f"import os, alisa; print(os.environ[{ASK_FOR_HUGE_PAGES!r}])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after
