"""Prompts that begin alike: names of their blocks, and what the scheduler asks of the cache that knows them.

A prompt is cut into blocks. The name of a block is a hash of its tokens and of the name of the block before it, so that
equal names mean equal beginnings. What else decides the bits of a block's K and V is in the names as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

BLOCK_TOKENS = 16
"""Tokens of a block."""

BlockName = bytes


class PrefixView(Protocol):
    """Which beginnings of prompts are known."""

    @property
    def hit_tokens(self) -> int:
        """What is taken from the cache ends at a multiple of this; itself a multiple of `BLOCK_TOKENS`."""
        ...

    def known(self, names: Sequence[BlockName]) -> int:
        """About how many of the first blocks of a prompt are in memory; asking changes nothing."""
        ...

    def fetch(self, names: Sequence[BlockName], first: int, count: int) -> int:
        """How many of the blocks first, first + 1, ... of this prompt can be read in the next step, at most `count`."""
        ...


def block_names(token_ids: Sequence[int], salt: bytes) -> tuple[BlockName, ...]:
    """Names of the whole blocks of a prompt; prompts with another salt have nothing in common."""
    names: list[BlockName] = []
    name = blake2b(salt, digest_size=32).digest()
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        words = array("q", token_ids[start : start + BLOCK_TOKENS])
        name = blake2b(name + words.tobytes(), digest_size=32).digest()
        names.append(name)
    return tuple(names)
