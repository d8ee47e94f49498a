"""Calls of functions in what a model says, for models whose template has them as Hermes and Qwen do.

<tool_call>
{"name": "look_up", "arguments": {"word": "whale"}}
</tool_call>
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def writes_tool_calls(template: str | None) -> bool:
    """Whether a chat template is of a model that was trained to write such calls."""
    return template is not None and OPENING in template and "tools" in template


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function, and what it is called with."""

    name: str
    arguments: str
    """JSON text."""


@dataclass(slots=True)
class ToolReader:
    """Divides a growing text into words for the user and calls; what might begin a call is held back."""

    num_calls: int = 0
    _held: str = field(default="")
    _inside: bool = field(default=False)
    _after_call: bool = field(default=False)

    def feed(self, text: str, *, final: bool = False) -> tuple[str, list[ToolCall]]:
        """Words and whole calls that became certain. A call that is none stays in the text as it was written."""
        pending, words, calls = self._held + text, "", list[ToolCall]()
        while True:
            if self._inside:
                body, closing, rest = pending.partition(CLOSING)
                if not closing and not final:
                    break
                call = _read_call(body)
                if call is None:
                    words += OPENING + body + closing
                else:
                    calls.append(call)
                    self._after_call = True
                pending, self._inside = rest, False
                continue
            if self._after_call and pending:  # the line ends behind a call
                pending, self._after_call = pending.removeprefix("\n"), False
            before, opening, rest = pending.partition(OPENING)
            if not opening:
                keep = 0 if final else _overlap(pending)
                words += pending[: len(pending) - keep]
                pending = pending[len(pending) - keep :]
                break
            words += before
            pending, self._inside = rest, True
        self._held = pending
        self.num_calls += len(calls)
        return words, calls


def _overlap(text: str) -> int:
    """Length of the longest end of `text` that begins a call."""
    return next((n for n in range(min(len(OPENING) - 1, len(text)), 0, -1) if OPENING.startswith(text[-n:])), 0)


def _read_call(text: str) -> ToolCall | None:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    match value:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    return None
