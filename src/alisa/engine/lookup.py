"""Prompt lookup: what followed the last time that a text read as it does now (Saxena, prompt-lookup-decoding, 2023).

Free guesses, and good ones wherever a text repeats itself: quotations, code that is edited, tables, names, loops.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens that must be equal before a place is taken for the same. One is equal by chance all the time; more than four
say nothing new."""


class Match(NamedTuple):
    """An earlier place of a text where it reads as it does at its end."""

    start: int
    """What followed: position of its first token."""
    num_equal: int
    """Tokens before it that are equal, of those that were compared."""


class TokenText:
    """The tokens of one sequence, to be searched; they only grow."""

    def __init__(self) -> None:
        self._tokens = array("i")

    def extend(self, token_ids: list[int]) -> None:
        """All tokens of the sequence so far; those that are known already are not looked at again."""
        self._tokens.extend(token_ids[len(self._tokens) :])

    def match(self) -> Match | None:
        """The latest earlier place with the longest match; None: there is none."""
        text = self._tokens.tobytes()
        if self._latest(text, SHORTEST_MATCH) is None:
            return None
        for count in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            place = self._latest(text, count)
            if place is not None:
                return Match(place + count, count)
        return None

    def following(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start` on; what lies after the end goes on as a loop from there would."""
        known = self._tokens[start : start + count].tolist()
        period = len(self._tokens) - start
        return [known[place % period] for place in range(count)]

    def _latest(self, text: bytes, count: int) -> int | None:
        """Position of the last `count` tokens at an earlier place."""
        size = self._tokens.itemsize
        wanted = text[-count * size :]
        if len(text) <= len(wanted):
            return None
        at = text.rfind(wanted, 0, len(text) - size)
        while at % size:  # -1 too, which is found nowhere
            if at < 0:
                return None
            at = text.rfind(wanted, 0, at + len(wanted) - 1)
        return at // size
