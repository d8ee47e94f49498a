"""Prompts from the command line, a file or standard input, each fault named with its file and line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from alisa.errors import InputError

STANDARD_INPUT = "-"
_EXPECTED = '{"prompt": "..."} or {"instruction": "...", "input": "..."}'


def gather_prompts(words: Sequence[str], source: str | None, limit: int | None = None) -> tuple[str, ...]:
    """The prompts to answer, at least one.

    Args:
        words: prompts given on the command line.
        source: a file name, `-` for standard input, or None.
        limit: take only so many from the beginning of `source`.

    Raises:
        InputError: none or both are given, or the file is not usable; the message names the file and the line.
    """
    if words and source is not None:
        raise InputError("Prompts were given both as arguments and with --input; give one of the two.")
    if not words and source is None:
        raise InputError('There is no prompt; write one (alisa generate "Once upon a time") or give --input FILE.')
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; at least 1 prompt is needed.")
    prompts = tuple(words) if source is None else read_prompts(source)[:limit]
    if not prompts:
        raise InputError(f"{_name(source)} holds no prompt.")
    for number, prompt in enumerate(prompts, 1):
        if not _is_unicode(prompt):
            raise InputError(f"Prompt {number} is not valid Unicode text; save it as UTF-8.")
    return prompts


def read_prompts(source: str) -> tuple[str, ...]:
    """All prompts in `source`, whose ending says how they are written.

    Raises:
        InputError: the file is missing, not UTF-8, of another kind, or a line is not as expected.
    """
    suffix = ".txt" if source == STANDARD_INPUT else Path(source).suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt"):
        raise InputError(f"{source} ends in none of .jsonl, .json and .txt, so its format is unknown; rename it.")
    text = _read_text(source)
    if suffix == ".json":
        return _from_list(source, text)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return tuple(line.strip() for _, line in lines)
    return tuple(_from_line(source, number, line) for number, line in lines)


def _read_text(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == STANDARD_INPUT else Path(source).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{_name(source)} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{_name(source)}, line {line}: not UTF-8 text; save the file as UTF-8.") from error


def _from_line(source: str, number: int, line: str) -> str:
    place = f"{source}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error}); each line must be {_EXPECTED}.") from error
    return _from_record(place, record)


def _from_list(source: str, text: str) -> tuple[str, ...]:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON ({error}); expected a list of {_EXPECTED}.") from error
    if not isinstance(records, list):
        raise InputError(f"{source}: holds a JSON {_kind(records)}, expected a list of {_EXPECTED}.")
    return tuple(_from_record(f"{source}, entry {number}", record) for number, record in enumerate(records, 1))


def _from_record(place: str, record: object) -> str:
    """The prompt that one JSON value means."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise InputError(f"{place}: a JSON {_kind(record)}, expected {_EXPECTED}.")
    prompt, instruction, extra = record.get("prompt"), record.get("instruction"), record.get("input", "")
    if isinstance(prompt, str):
        return prompt
    if prompt is None and isinstance(instruction, str) and isinstance(extra, str):
        return f"{instruction}\n\n{extra}" if extra else instruction
    found = ", ".join(f"{name} ({_kind(value)})" for name, value in record.items()) or "no fields"
    raise InputError(f"{place}: found {found}, expected {_EXPECTED}.")


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    match value:
        case dict():
            return "object"
        case list():
            return "list"
        case str():
            return "string"
        case bool():
            return "boolean"
        case None:
            return "null"
        case _:
            return "number"


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which no tokenizer and no UTF-8 file can take."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _name(source: str | None) -> str:
    return "Standard input" if source == STANDARD_INPUT else str(source)
