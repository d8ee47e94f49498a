"""Server-sent events as bytes, of JSON objects; of those that differ in a text alone, the rest is written once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import pydantic_core

LAST_FRAME = b"data: [DONE]\n\n"
PING_FRAME = b": ping\n\n"
"""A comment: nobody reads it."""


def to_json(value: object) -> bytes:
    """Compact JSON as UTF-8, of dataclasses too; `json` takes several times as long."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


def to_frame(value: Mapping[str, Any]) -> bytes:
    """An event with this object."""
    return b"data: " + to_json(value) + b"\n\n"


class TextFrames:
    """Writes events that are alike but for one text.

    Args:
        event: a text to the event with it, which has it once.
    """

    def __init__(self, event: Callable[[str], Mapping[str, Any]]) -> None:
        # Nobody else's text can have a name that was drawn just now.
        mark = uuid.uuid4().hex
        self._head, self._tail = to_frame(event(mark)).split(to_json(mark))

    def write(self, text: str) -> bytes:
        """The event with this text."""
        return self._head + to_json(text) + self._tail
