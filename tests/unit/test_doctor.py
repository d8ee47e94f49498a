"""Facts from this machine, and what follows from facts of machines that we do not have."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alisa.doctor.facts import EXTRAS, Facts, Gpu, Native, gather
from alisa.doctor.finding import Status
from alisa.doctor.findings import diagnose
from alisa.doctor.self_test import SelfTest, run_self_test
from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from alisa.machine import Cpu, Place

GIB = 1024**3
TMP = Place("/tmp", "ext4", 50 * GIB, writable=True)
NATIVE = Native(
    isas=("avx512_vnni", "avx512", "avx2", "portable"),
    products=("avx512_vnni", "avx2", "portable"),
    reason="",
    built=True,
    shares_threads=True,
    compiler="/usr/bin/c++",
    self_test=SelfTest(1e-7),
)
NO_NATIVE = replace(NATIVE, isas=(), products=(), reason="no module", built=False, compiler=None, self_test=None)
HEALTHY = Facts(
    alisa="0.1.0",
    python="3.11.7",
    torch="2.13.0",
    cuda=None,
    cpu=Cpu("Some CPU", frozenset({"avx2", "avx512f"})),
    num_threads=2,
    num_cpus=2.0,
    spinning="GOMP_SPINCOUNT=10000",
    threads_fixed=False,
    native=NATIVE,
    fast_bfloat16=True,
    dtype_16bit="bfloat16",
    packed=("float32", "bfloat16"),
    gpu=None,
    nvidia_driver=False,
    triton_failure="",
    free_bytes=20 * GIB,
    memory_limit=None,
    kv_bytes=10 * GIB,
    kv_disk_bytes=40 * GIB,
    temporary=TMP,
    disk_tier=TMP,
    huge_pages="always",
    huge_pages_asked=False,
    extras={"ray": "2.60.0", "matplotlib": "3.10", "lm_eval": "0.4.9", "transformers": "5.17", "triton": None},
    embedded_model=True,
)
GPU = Gpu(name="Some GPU", total_bytes=16 * GIB, free_bytes=15 * GIB)


def test_a_healthy_machine_needs_nothing():
    findings = diagnose(HEALTHY)
    assert {finding.status for finding in findings} == {Status.OK}
    assert not [finding for finding in findings if finding.way_out]
    text = "\n".join(finding.text for finding in findings)
    assert "torch 2.13.0 (without CUDA)" in text
    assert "Some CPU: AVX2, AVX-512" in text
    assert "avx512_vnni runs (also there: avx512, avx2, portable); layers: avx512_vnni" in text
    assert "KV rows get up to 10.0 GiB of it" in text
    assert "rows that fit no memory may take 40.0 GiB" in text


@pytest.mark.parametrize(
    ("change", "topic", "status", "text", "way_out"),
    [
        ({"native": NO_NATIVE}, "native kernels", "note", "not built", "install a C++ compiler"),
        (
            {"native": replace(NO_NATIVE, compiler="/bin/c++")},
            "native kernels",
            "note",
            "not built",
            "a compiler is here",
        ),
        ({"native": replace(NO_NATIVE, built=True)}, "native kernels", "problem", "no module", "--force-reinstall"),
        (
            {"native": replace(NATIVE, self_test=SelfTest(0.5))},
            "self test",
            "problem",
            "by 5.0e-01",
            "--force-reinstall",
        ),
        ({"native": replace(NATIVE, self_test=SelfTest(None, "Boom"))}, "self test", "problem", "Boom", "reinstall"),
        ({"native": replace(NATIVE, shares_threads=False)}, "threads", "note", "start their own", "PyPI"),
        (
            {"num_threads": 16, "num_cpus": 2.5, "threads_fixed": True},
            "threads",
            "note",
            "16, 2.5 processors",
            "OMP_NUM_THREADS=2",
        ),
        (
            {"num_threads": 16, "num_cpus": 0.5, "threads_fixed": True},
            "threads",
            "note",
            "16, 0.5 processors",
            "OMP_NUM_THREADS=1",
        ),
        ({"num_threads": 1, "num_cpus": 8.0}, "threads", "note", "most are idle", "OMP_NUM_THREADS"),
        ({"fast_bfloat16": False, "dtype_16bit": "float32"}, "dtype", "note", "in float32", "--dtype bfloat16"),
        ({"packed": ()}, "linear layers", "note", "not packed", "PyPI"),
        ({"nvidia_driver": True}, "GPU", "note", "torch sees no GPU", "CUDA build"),
        ({"nvidia_driver": True, "cuda": "12.8"}, "GPU", "note", "torch sees no GPU", "nvidia-smi"),
        ({"gpu": GPU}, "GPU", "note", "Some GPU, 15.0 GiB of 16.0 GiB free", "pip install triton"),
        ({"gpu": GPU, "triton_failure": "Bad"}, "GPU", "problem", "Triton fails: Bad", "triton"),
        (
            {"kv_bytes": GIB // 2, "memory_limit": GIB},
            "memory",
            "note",
            "container may use 1.0 GiB",
            "--kv-device-memory",
        ),
        ({"disk_tier": Place("/x", "tmpfs", GIB, True)}, "disk", "note", "RAM and not a disk", "--kv-disk-path"),
        ({"disk_tier": Place("/x", "ext4", 10**6, True)}, "disk", "note", "976.6 KiB free", "make room"),
        ({"disk_tier": Place("/x", "ext4", GIB, False)}, "disk", "problem", "cannot be written", "choose another"),
        ({"disk_tier": Place("/x", None, None, False)}, "disk", "problem", "/x is not a directory", "make it"),
        ({"huge_pages": "madvise"}, "huge pages", "note", "says not to ask", "THP_MEM_ALLOC_ENABLE=1"),
        ({"huge_pages": "never"}, "huge pages", "note", "never", "transparent_hugepage"),
        (
            {"extras": {"ray": None, "lm_eval": None, "matplotlib": "3.10", "triton": None}},
            "extras",
            "note",
            "matplotlib 3.10; not there: ray, lm_eval",
            "pip install 'alisa[ray,lm_eval]'",
        ),
        ({"embedded_model": False}, "model", "note", "not inside the package", "--model"),
    ],
)
def test_what_is_wrong_is_said_once_with_a_way_out(change, topic, status, text, way_out):
    findings = [finding for finding in diagnose(replace(HEALTHY, **change)) if finding.status is not Status.OK]
    [finding] = findings
    assert (finding.topic, finding.status) == (topic, status)
    assert text in finding.text
    assert way_out in finding.way_out


@pytest.mark.parametrize(
    ("change", "topic"),
    [
        ({"huge_pages": "madvise", "huge_pages_asked": True}, "huge pages"),
        ({"huge_pages": None}, "huge pages"),
        ({"gpu": GPU, "extras": {"triton": "3.4"}, "cuda": "12.8"}, "GPU"),
        ({"gpu": GPU, "extras": {"triton": "3.4"}, "fast_bfloat16": False}, "dtype"),
        ({"num_threads": 3, "num_cpus": 2.5}, "threads"),
    ],
)
def test_what_is_in_order(change, topic):
    assert {f.status for f in diagnose(replace(HEALTHY, **change)) if f.topic == topic} == {Status.OK}


def test_this_machine_is_described(tmp_path):
    facts = gather(tmp_path, tmp_path / "missing")
    assert facts.torch == torch.__version__
    assert facts.native.isas == library.isa_names()
    assert (facts.native.self_test is not None) == library.available()
    assert 0 < facts.kv_bytes < facts.free_bytes
    assert facts.kv_disk_bytes is None
    assert facts.temporary.path == str(tmp_path)
    problems = [finding for finding in diagnose(facts) if finding.status is Status.PROBLEM]
    assert [finding.topic for finding in problems] == ["disk"]


needs_kernels = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


@needs_kernels
@pytest.mark.parametrize("isa", library.isa_names())
def test_the_self_test_passes_on_every_instruction_set(isa):
    assert run_self_test(cpu.CpuKernels(isa)).passed


class Altered:
    """Kernels that write rows as they should and attend a little differently."""

    def __init__(self, alter):
        self._kernels = cpu.CpuKernels()
        self._alter = alter
        self.append = self._kernels.append

    def __call__(self, *args):
        attended = self._kernels(*args)
        return attended._replace(out=self._alter(attended.out))


def fail(_):
    raise TypeError("incompatible function arguments")


@needs_kernels
@pytest.mark.parametrize(
    ("alter", "failure"),
    [
        (lambda out: out * 1.001, ""),
        (lambda out: out * float("nan"), ""),
        (fail, "TypeError: incompatible function arguments"),
    ],
)
def test_the_self_test_notices(alter, failure):
    result = run_self_test(Altered(alter))
    assert not result.passed
    assert result.failure == failure


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_threads": 16, "num_cpus": 2.5}, "an engine uses 2 of torch's 16"),
        ({"threads_fixed": True}, "fixed by the environment"),
        ({}, "fewer while other programs are busy (waiting: GOMP_SPINCOUNT=10000)"),
    ],
)
def test_what_becomes_of_the_threads_is_said(change, text):
    [finding] = [finding for finding in diagnose(replace(HEALTHY, **change)) if finding.topic == "threads"]
    assert finding.status is Status.OK
    assert text in finding.text


def test_every_extra_of_the_package_is_looked_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS.values()} == {*project["optional-dependencies"]} - {"test", "dev"}
    for package, extra in EXTRAS.items():
        needed = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]]
        assert package.replace("_", "-") in needed, extra
