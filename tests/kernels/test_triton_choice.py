"""The engine takes the Triton kernels where they belong, and nobody else needs them."""

import logging
import subprocess
import sys

import pytest
import torch

from alisa.kernels import choose as engine_kernels
from alisa.kernels.choose import REFERENCE_BACKEND, choose_backend

CUDA = torch.device("cuda")


def test_a_gpu_gets_the_triton_kernels():
    pytest.importorskip("triton")
    kernels = choose_backend(CUDA)
    assert (kernels.name, kernels.selection) == ("triton", kernels.attend)


def test_without_triton_the_twins_run_and_one_warning_says_so(monkeypatch, caplog):
    engine_kernels._warn_once.cache_clear()
    monkeypatch.setitem(sys.modules, "alisa.kernels.triton.kernels", None)  # what an import without triton comes to
    with caplog.at_level(logging.WARNING, logger="alisa"):
        assert choose_backend(CUDA) is REFERENCE_BACKEND
        assert choose_backend(CUDA) is REFERENCE_BACKEND
    assert [record.getMessage().count("triton") > 0 for record in caplog.records] == [True]


def test_nobody_imports_triton_who_does_not_use_it():
    program = "import sys, alisa.llm, alisa.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
