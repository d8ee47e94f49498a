"""Text from tokens, one token at a time, for streaming.

A token is not a piece of text: characters are split over byte tokens, and sentencepiece decoders drop the space in
front of whatever comes first. So a short window of tokens is decoded each time and compared with what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    r"""Turns a stream of token ids into pieces of text whose sum is the decoding of all ids.

    ```
    ids   ... t0 | t1 t2 | t3 t4 t5          t1 t2: anchor, already emitted; decoded again so that t3 is not the first
                 ^       ^        ^          t3 t4 t5: held while they end inside a character
              anchor  emitted    end
    ```

    Text is held back while it ends in a replacement character, which an unfinished character decodes to, and while a
    run of byte tokens goes on: sentencepiece decodes a whole run to replacement characters if one of them is wrong, so
    it is only certain when it is over. Tokens that are left out of the text do not end it.

    Args:
        decode: ids -> text, special tokens left out.
        held_ids: byte tokens (`<0x0A>`) and special tokens, after which nothing new is certain.
        vocab_size: ids from here on have no text; models may have padded rows.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], held_ids: Set[int], vocab_size: int) -> None:
        self._decode = decode
        self._held_ids = held_ids
        self._vocab_size = vocab_size
        self._window: list[int] = []
        self._num_emitted = 0
        self._emitted_text = ""

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is unfinished."""
        self._window.append(token_id)
        if token_id in self._held_ids or token_id >= self._vocab_size:
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """The text still held, unfinished characters as replacement characters; the stream is over."""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        """Move the window to the end and return what `text` has beyond the text emitted before."""
        piece = text[len(self._emitted_text) :]
        new_ids = self._window[self._num_emitted :]
        new_text = self._decode(new_ids)
        if new_text:
            # Tokens that give text even as the first ones make a good anchor: the next ones decode as a continuation.
            self._window = new_ids
            text = new_text
        self._num_emitted = len(self._window)
        self._emitted_text = text
        return piece
