"""Our threads are torch's threads: one OpenMP runtime, no second pool."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from alisa.kernels.native import kernels as cpu
from alisa.kernels.native import library
from tests.kernels.cases import assert_agrees, make_problem

pytestmark = pytest.mark.skipif(not library.available(), reason=library.unavailable_reason())


def test_torch_brings_the_runtime_we_use():
    if "OpenMP" not in torch.__config__.parallel_info() or sys.platform != "linux":
        pytest.skip("torch was built without OpenMP")
    assert library.openmp().parallel != 0


def test_a_call_starts_no_threads_beside_torchs():
    if not library.openmp().parallel:
        pytest.skip("no OpenMP runtime to share")
    script = """
        import os, torch
        from alisa.kernels.native.kernels import CpuKernels
        from tests.kernels.cases import make_problem
        torch.set_num_threads(2)
        (torch.ones(1 << 22) + 1).sum()  # torch's team is up
        before = len(os.listdir("/proc/self/task"))
        problem = make_problem("float32", num_rows=5000, counts=[5000, 5000])
        kernels = CpuKernels()
        for _ in range(3):
            kernels(*problem.args())
        assert len(os.listdir("/proc/self/task")) == before, os.listdir("/proc/self/task")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_callers_on_several_threads_share_one_object():
    kernel = cpu.CpuKernels()
    problems = [make_problem("bfloat16", num_rows=900, seed=seed) for seed in range(4)]
    failures = []

    def call(problem):
        try:
            for _ in range(20):
                assert_agrees(kernel(*problem.args()), problem)
        except AssertionError as failure:
            failures.append(failure)

    callers = [threading.Thread(target=call, args=(problem,)) for problem in problems]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures
