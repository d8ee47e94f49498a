"""The file of results: one JSON line per finished request, written as it finishes, continued by the next run.

    {"index": 0, "prompt": "...", "text": "...", "token_ids": [...], "finish_reason": "eos", ..., "run": "..."}

Where several texts are wanted for a prompt, each is a line, with its number in `sample`.

`run` is a digest of the settings that decide the tokens. A later run continues a file only when every line carries its
own digest and its own prompts, so that no file ever mixes two kinds of results. A line belongs to the prompt with its
`id`, or where there is none to the one with its index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from alisa.cli.files import JsonLinesFile
from alisa.cli.prompts import Prompt
from alisa.errors import InputError

if TYPE_CHECKING:
    from alisa.outputs import RequestOutput, TokenLogprob

_Places = dict[tuple[str | int | None, int], int]
"""The user's id of a prompt, or its index, and the number of the text -> the place in the list."""

_WAY_OUT = "choose another --output, or delete the file to start again"


def settings_digest(settings: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits that two runs share exactly when all their settings are equal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def result_record(prompt: Prompt, output: RequestOutput, run: str) -> dict[str, object]:
    """One finished request as plain JSON values."""
    measured = asdict(output.report)
    timings = {name: round(value, 6) for name, value in measured.items() if name.endswith("_s")}
    counts = {name: value for name, value in measured.items() if not name.endswith("_s")}
    result = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "timings": timings,
        **counts,
    }
    asked = {name: getattr(output, name) for name in ("stop_reason", "logprobs", "prompt_logprobs")}
    result |= {name: _plain(value) for name, value in asked.items() if value is not None}
    return _record(prompt, result, run)


def _plain(value: str | int | tuple[TokenLogprob, ...]) -> object:
    """The log probabilities of a text as a list of objects; what is plain already as it is."""
    return [asdict(found) for found in value] if isinstance(value, tuple) else value


def error_record(prompt: Prompt, problem: str, run: str) -> dict[str, object]:
    """A prompt that cannot be used, and why."""
    return _record(prompt, {"text": None, "finish_reason": "error", "error": problem}, run)


def _record(prompt: Prompt, result: Mapping[str, object], run: str) -> dict[str, object]:
    own_id = {} if prompt.id is None else {"id": prompt.id}
    sample = {} if prompt.sample is None else {"sample": prompt.sample}
    own = {"settings": prompt.settings, "metadata": prompt.metadata}
    given = {name: dict(values) for name, values in own.items() if values}
    return {"index": prompt.index, **own_id, **sample, "prompt": prompt.text, **result, **given, "run": run}


class ResultFile:
    """An open file of results that knows which prompts it already holds.

    A failed `append` leaves all earlier lines intact and at most one torn line, which the next run cuts off.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], run: str) -> None:
        """Open `path` for appending, after checking that what is in it belongs to this run.

        Raises:
            InputError: the file holds something else, cannot be written, or another process writes to it; it is left as
                it was.
        """
        self._total = len(prompts)
        self._lines = JsonLinesFile(path, line_start=b'{"index": ', writer="result of alisa generate", way_out=_WAY_OUT)
        try:
            self._finished = _finished_indices(self._lines, prompts, run)
            self._lines.cut_torn_line()
        except BaseException:
            self._lines.close()
            raise

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the prompts whose results are in the file."""
        return frozenset(self._finished)

    def append(self, index: int, record: Mapping[str, object]) -> None:
        """Write one result.

        Raises:
            InputError: the system refuses, for example because the disk is full.
        """
        try:
            self._lines.append(record)
        except OSError as error:
            raise InputError(
                f"{self._lines.path} cannot be written: {error.strerror}; {len(self._finished)} of {self._total} "
                "prompts are in it. Make room and run the same command again to go on."
            ) from error
        self._finished.add(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()


def _finished_indices(lines: JsonLinesFile, prompts: Sequence[Prompt], run: str) -> set[int]:
    """The prompts that every line of an earlier run belongs to."""
    by_id: _Places = {(p.id, p.sample or 0): number for number, p in enumerate(prompts) if p.id is not None}
    by_index: _Places = {(p.index, p.sample or 0): number for number, p in enumerate(prompts)}
    finished: set[int] = set()
    for place, record in lines.read():
        if not {"index", "prompt", "run"} <= record.keys():
            raise lines.refuse(place)
        if record["run"] != run:
            raise InputError(
                f"{place}: comes from a run with another model, policy or sampling settings "
                f"(run {record['run']}, now {run}); {_WAY_OUT}."
            )
        known, key = (by_id, record["id"]) if _has_id(record) else (by_index, record["index"])
        sample = record.get("sample", 0)
        if not (isinstance(key, str | int) and isinstance(sample, int)):
            key, sample = None, 0  # of nobody
        number = known.get((key, sample))
        if number is not None and _is_of(record, prompts[number]):
            finished.add(number)
        elif number is None and sample > 0 and (key, 0) in known:
            continue  # fewer texts are wanted now
        elif record.get("finish_reason") != "error":  # a prompt that could not be used may have been mended since
            which = f"the prompt with the id {record['id']!r}" if _has_id(record) else f"prompt {record['index']}"
            raise InputError(f"{place}: its prompt or its settings are not those of {which} of this run; {_WAY_OUT}.")
    return finished


def _has_id(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("id"), str | int)


def _is_of(record: Mapping[str, Any], prompt: Prompt) -> bool:
    return record["prompt"] == prompt.text and record.get("settings", {}) == prompt.settings
