"""Every Triton kernel compiles to machine code for data-centre GPUs of two generations; none of them is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cases import ROW_DTYPES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("extent", ["selection", *ROW_DTYPES])
def test_kernels_compile_without_spilling(extent, tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.kernels.compile_triton", extent]
    result = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
