"""The native code in a program of its own: under the sanitizers, and on another architecture."""

import shutil
import subprocess
from pathlib import Path

import pytest

from alisa.kernels.native import library
from alisa.kernels.native import prefill as cpu_prefill
from alisa.kernels.native import product as cpu_product

ROOT = Path(__file__).parents[2]


def build_and_run(directory, options, emulator=()):
    commands = [
        ["cmake", "-S", ROOT, "-B", directory, *options],
        ["cmake", "--build", directory, "--target", "native_check", "--parallel", "2"],
        [*emulator, directory / "native_check"],
    ]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return result.stdout


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_check_of_the_native_code_compiles():
    """It is run by slow tests only; a task that has other fields shows here."""
    sources = ROOT / "src" / "alisa" / "kernels" / "native" / "csrc"
    places = [f"-I{topic}" for topic in sources.iterdir() if topic.is_dir()]
    command = ["c++", "-std=c++17", "-fsyntax-only", *places, ROOT / "tests" / "kernels" / "native" / "check.cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_native_code_is_clean(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer, every instruction set of this machine."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    printed = build_and_run(tmp_path, ["-DALISA_SANITIZE=ON"])
    for isa in (*library.isa_names(), "portable"):
        assert f"{isa}: checked" in printed
    for isa in cpu_product.model_isa_names():
        assert f"{isa}: layers checked" in printed
    for isa in cpu_prefill.prefill_isa_names():
        assert f"{isa}: prefill checked" in printed


@pytest.mark.slow
def test_native_code_runs_on_aarch64(tmp_path):
    """Debian: `apt install g++-aarch64-linux-gnu qemu-user`."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    missing = [tool for tool in ("cmake", compiler, emulator) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    options = [
        "-DALISA_CHECK=ON",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    ]
    printed = build_and_run(tmp_path, options, [emulator, "-L", "/usr/aarch64-linux-gnu"])
    assert "portable: checked" in printed
    assert "portable: layers checked" in printed
