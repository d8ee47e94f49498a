"""Text to measure on, read as its publishers ship it.

.txt, .py       one document (WikiText-2, PTB, a book, a module)
.jsonl, .json   one document for each record: {"text"}, {"prompt"}, or Alpaca's {"instruction", "input", "output"}
a directory     its test split: the files with the word `test` in their name if there are any, otherwise every file
                of these kinds but licences and notes; not those of its directories
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from alisa.errors import InputError

_SUFFIXES = (".txt", ".py", ".jsonl", ".json")
_NOTES = ("licence", "license", "copying", "notice", "readme")


def read_documents(path: Path) -> list[str]:
    """The documents of a file or directory, in the order of their names.

    Raises:
        InputError: the path or a record in it is not usable.
    """
    files = _files(path)
    documents = [text for file in files for text in _read(file) if text.strip()]
    if not documents:
        raise InputError(f"{path} has no text; give a .txt, .py, .jsonl or .json file, or a directory with one.")
    return documents


def read_records(path: Path) -> list[Mapping[str, object]]:
    """The JSON objects of a .jsonl file or a .json list.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if bad := [number for number, record in enumerate(records, 1) if not isinstance(record, Mapping)]:
        raise InputError(f"{path}: record {bad[0]} is not a JSON object.")
    return records


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"There is no file or directory {path}; give a text to measure on.")
    files = sorted(
        file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.lower().startswith(_NOTES)
    )
    tests = [file for file in files if "test" in re.split(r"[^a-z]", file.name.lower())]
    return tests or files


def _read(file: Path) -> list[str]:
    if file.suffix in (".jsonl", ".json"):
        return [_text(record, f"{file}, record {number}") for number, record in enumerate(read_records(file), 1)]
    try:
        return [file.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}.") from error


def _text(record: Mapping[str, object], place: str) -> str:
    """The text of one record: all its parts, a blank line between them, as in training on Alpaca."""
    for names in (("text",), ("prompt",), ("instruction", "input", "output")):
        if names[0] in record:
            parts = [str(record[name]) for name in names if record.get(name)]
            return "\n\n".join(parts)
    raise InputError(f'{place}: no "text", "prompt" or "instruction" in it; there is {", ".join(record) or "nothing"}.')
