"""The bytes that a single token stands for; of many tokens they are only part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Looks tokens up in a vocabulary.

    Args:
        backend: the vocabulary.
        added: tokens that are not made of pieces, by id: their text is what they stand for.
    """

    def __init__(self, backend: Tokenizer, added: Mapping[int, AddedToken]) -> None:
        self._backend = backend
        self._added = added
        self._is_byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of a token, special ones as they are written; none for ids without a token."""
        added: Any = self._added.get(token_id)
        text = added.content if added is not None else self._backend.id_to_token(token_id)
        if text is None:
            return b""
        if added is not None:
            return text.encode()
        if self._is_byte_level:
            return bytes(_BYTES[char] for char in text if char in _BYTES)
        byte = _BYTE_TOKEN.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_chars() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as they are, the others as characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_chars()
