"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_native_code_is_clean(tmp_path):
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    commands = [
        ["cmake", "-S", ROOT, "-B", tmp_path, "-DALISA_SANITIZE=ON"],
        ["cmake", "--build", tmp_path, "--target", "native_check", "--parallel", "2"],
        [tmp_path / "native_check"],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
