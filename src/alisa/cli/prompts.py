"""Prompts from the command line, a file or standard input, each fault named with its file and line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from alisa.cli.files import STANDARD_INPUT
from alisa.config import SamplingParams
from alisa.errors import InputError

_EXPECTED = '{"prompt": "..."} or {"instruction": "...", "input": "..."}'
_SETTINGS = frozenset(field.name for field in fields(SamplingParams))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, and what its line says about it."""

    text: str
    """Empty where the line could not be read."""
    name: str
    """How a message about it begins: `Prompt 3`, or `a.jsonl, line 3: the prompt`."""
    index: int = 0
    """Place in the list of prompts."""
    sample: int | None = None
    """Which text for the prompt this asks for; None: the only one."""
    id: str | int | None = None
    """The user's own name of it, unique in its file; kept in the result."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams` that this prompt has for itself."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """All other fields of the line; kept in the result."""
    problem: str | None = None
    """Why it cannot be used, as a sentence."""


def num_samples(prompt: Prompt, n: int) -> int:
    """How many texts are wanted for a prompt: `n`, or what its own line says."""
    return prompt.settings.get("n", n)


def each_sample(prompts: Sequence[Prompt], n: int, first: int = 0) -> tuple[Prompt, ...]:
    """Every prompt as often as texts are wanted for it.

    Args:
        prompts: some that follow each other.
        n: texts for each, where its line does not say.
        first: place of the first of them in the list of all prompts.
    """
    wanted = [num_samples(prompt, n) for prompt in prompts]
    return tuple(
        replace(prompt, index=index, sample=sample if count > 1 else None)
        for index, (prompt, count) in enumerate(zip(prompts, wanted, strict=True), first)
        for sample in range(count)
    )


def in_part(prompts: tuple[Prompt, ...], part: str | None) -> tuple[Prompt, ...]:
    """Every N-th prompt from prompt I on, where `part` is `I/N`; None: all.

    Neighbours go to different parts, because prompts that follow each other are often of one length.

    Raises:
        InputError: `part` is something else, or no prompt is in it.
    """
    if part is None:
        return prompts
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise InputError(f"--shard is {part!r}; write I/N with I from 0 up to but not N, for example 0/16.")
    mine = tuple(prompt for prompt in prompts if prompt.index % int(count) == int(number))
    if not mine:
        raise InputError(f"--shard {part} is empty: there are fewer prompts than parts; ask for fewer.")
    return mine


def gather_prompts(
    words: Sequence[str], source: Path | None, limit: int | None = None, *, keep_invalid: bool = False
) -> tuple[Prompt, ...]:
    """The prompts to answer, at least one.

    Args:
        words: prompts given on the command line.
        source: a file, `-` for standard input, or None.
        limit: take only this many from the beginning of `source`.
        keep_invalid: a line that cannot be used becomes a prompt with a problem instead of an error.

    Raises:
        InputError: none or both are given, or the file is not usable; the message names the file and the line.
    """
    if words and source is not None:
        raise InputError("Prompts were given both as arguments and with --input; give one of the two.")
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; at least 1 prompt is needed.")
    if source is not None:
        prompts = read_prompts(source, keep_invalid=keep_invalid)[:limit]
        if not prompts:
            raise InputError(f"{_name(source)} holds no prompt.")
        return prompts
    if not words:
        raise InputError('There is no prompt; write one (alisa generate "Once upon a time") or give --input FILE.')
    return tuple(_from_word(number, word) for number, word in enumerate(words, 1))


def read_prompts(source: Path, *, keep_invalid: bool = False) -> tuple[Prompt, ...]:
    """All prompts in `source`, whose ending says how they are written.

    Raises:
        InputError: the file is missing or of another kind, two prompts have one id, or a line is not as expected and
            `keep_invalid` is not asked for.
    """
    suffix = ".txt" if source == STANDARD_INPUT else source.suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt"):
        raise InputError(f"{source} ends in none of .jsonl, .json and .txt, so its format is unknown; rename it.")
    prompts: list[Prompt] = []
    ids: dict[str | int, str] = {}
    for place, read in _entries(source, suffix):
        prompt = _read(place, read, keep_invalid=keep_invalid)
        if prompt.id is not None and (first := ids.setdefault(prompt.id, place)) != place:
            raise InputError(f"{place}: the id {prompt.id!r} is also that of {first}; ids must differ.")
        prompts.append(prompt)
    return tuple(prompts)


def read_line(line: bytes, place: str, suffix: str, *, keep_invalid: bool) -> Prompt:
    """The prompt on one line, which is not empty.

    Args:
        line: of the file, with or without its end.
        place: file and line, for messages.
        suffix: of the file, `.txt` or `.jsonl`.
        keep_invalid: a line that cannot be used becomes a prompt with a problem.

    Raises:
        InputError: the line is not as expected, and `keep_invalid` is not asked for.
    """
    read = _from_text if suffix == ".txt" else _from_json
    return _read(place, lambda: read(place, line), keep_invalid=keep_invalid)


def without_mark(data: bytes) -> bytes:
    """The bytes of a file without a byte order mark at its beginning."""
    return data.removeprefix(b"\xef\xbb\xbf")


def _read(place: str, read: Callable[[], Prompt], *, keep_invalid: bool) -> Prompt:
    try:
        return read()
    except InputError as error:
        if not keep_invalid:
            raise
        return Prompt(text="", name=place, problem=str(error))


def _entries(source: Path, suffix: str) -> Iterator[tuple[str, Callable[[], Prompt]]]:
    """Place of every entry, and what reads it or raises."""
    data = _bytes(source)
    if suffix == ".json":
        for number, value in enumerate(_list(source, data), 1):
            place = f"{source}, entry {number}"
            yield place, lambda place=place, value=value: _from_value(place, value)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            place = f"{_name(source)}, line {number}"
            read = _from_text if suffix == ".txt" else _from_json
            yield place, lambda place=place, line=line, read=read: read(place, line)


def _bytes(source: Path) -> bytes:
    try:
        data = sys.stdin.buffer.read() if source == STANDARD_INPUT else source.read_bytes()
    except OSError as error:
        raise InputError(f"{_name(source)} cannot be read: {error.strerror}.") from error
    return without_mark(data)


def _list(source: Path, data: bytes) -> list[object]:
    try:
        records = json.loads(_decoded(str(source), data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON ({error}); expected a list of {_EXPECTED}.") from error
    if not isinstance(records, list):
        raise InputError(f"{source}: holds a JSON {_kind(records)}, expected a list of {_EXPECTED}.")
    return records


def _from_word(number: int, word: str) -> Prompt:
    name = f"Prompt {number}"
    return Prompt(text=_unicode(name, word), name=name)


def _from_text(place: str, line: bytes) -> Prompt:
    return Prompt(text=_decoded(place, line).strip(), name=f"{place}: the prompt")


def _from_json(place: str, line: bytes) -> Prompt:
    try:
        value = json.loads(_decoded(place, line))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error}); each line must be {_EXPECTED}.") from error
    return _from_value(place, value)


def _from_value(place: str, value: object) -> Prompt:
    """The prompt that one JSON value means."""
    name = f"{place}: the prompt"
    if isinstance(value, str):
        return Prompt(text=_unicode(name, value), name=name)
    if not isinstance(value, dict):
        raise InputError(f"{place}: a JSON {_kind(value)}, expected {_EXPECTED}.")
    record = dict(value)
    text = _take_text(place, record)
    own_id = record.pop("id", None)
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
        raise InputError(f"{place}: its id is a JSON {_kind(own_id)}, a string or a whole number is needed.")
    settings: dict[str, Any] = {key: record.pop(key) for key in [*record] if key in _SETTINGS}
    settings = {key: setting for key, setting in settings.items() if setting is not None}
    try:
        SamplingParams(**settings)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if isinstance(record.get("metadata"), dict):
        record |= record.pop("metadata")
    return Prompt(text=_unicode(name, text), name=name, id=own_id, settings=settings, metadata=record)


def _take_text(place: str, record: dict[str, object]) -> str:
    """The text of the prompt; the fields that made it are taken out."""
    match record:
        case {"prompt": str(text)}:
            del record["prompt"]
            return text
        case {"instruction": str(text)} if record.get("prompt") is None and isinstance(record.get("input", ""), str):
            record.pop("prompt", None)
            del record["instruction"]
            extra = record.pop("input", "")
            return f"{text}\n\n{extra}" if extra else text
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


def _decoded(place: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        where = place if b"\n" not in data else f"{place}, line {line}"
        raise InputError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error


def _unicode(name: str, text: str) -> str:
    """`text`, without lone surrogates, which no tokenizer and no UTF-8 file can take."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{name} is not valid Unicode text; save it as UTF-8.")
    return text


def _name(source: Path) -> str:
    return "Standard input" if source == STANDARD_INPUT else str(source)
