"""Whom the events of requests go to, and where they wait for a reader who takes them when he likes.

All of this happens in one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from alisa.outputs import RequestOutput, TextDelta

Event = TextDelta | RequestOutput


class Listener(Protocol):
    """Is called by its event loop as soon as there is something, and raises nothing."""

    def put(self, events: Sequence[Event]) -> None:
        """Some events, at least one: after each step what it gave to the reader's requests."""

    def fail(self, error: Exception) -> None:
        """Nothing more comes, because of this."""


class Inbox:
    """A reader that keeps events, in the order in which they came, until somebody takes all that are there."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, events: Sequence[Event]) -> None:
        """See `Listener`."""
        self._events += events
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """See `Listener`."""
        self._error = error
        self._arrived.set()

    def empty_into(self, other: Listener) -> None:
        """What is here is there, and here no more."""
        events, self._events = self._events, list[Event]()
        if events:
            other.put(events)
        if self._error is not None:
            other.fail(self._error)

    async def take(self) -> Sequence[Event]:
        """All events that are there, at least one.

        Raises:
            Exception: what this reader has failed with, after all that came before.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        events, self._events = self._events, list[Event]()
        return events
