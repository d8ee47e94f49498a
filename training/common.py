"""Paths, configuration and the prose, shared by every script of the training project."""

import argparse
import lzma
import os
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
EMBEDDED = HERE.parent / "src" / "alisa" / "embedded"
BOOK_SEPARATOR = "\n\n\n"


def load_config() -> dict:
    """All hyper-parameters, from config.toml beside this file."""
    return tomllib.loads((HERE / "config.toml").read_text())


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that knows where the prose is: --data DIR, or ALISA_DATA."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("ALISA_DATA"),
        help="folder with prose.txt.xz and heldout/ (default: $ALISA_DATA)",
    )
    return result


def read_prose(data: Path, num_bytes: int) -> str:
    """The first num_bytes of the prose, decoded in memory; the text itself is never stored."""
    with lzma.open(Path(data) / "prose.txt.xz") as stream:
        return stream.read(num_bytes).decode("utf-8", errors="ignore")


def read_heldout(data: Path) -> dict[str, str]:
    """The three books that neither the tokenizer nor the model has seen."""
    folder = Path(data) / "heldout"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
