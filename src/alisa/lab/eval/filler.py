"""Running text that recall tasks hide their facts in, sentence by sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from random import Random

from alisa.errors import InputError
from alisa.model.tokenizer import Tokenizer

_MOST_CHARACTERS = 400_000
"""Of each document; more would only take time to tokenise."""

DEFAULT_TEXT = """
The tide had gone out in the night and left the boats on their sides. A man with a lantern walked along the wall and
counted them. There was no wind yet. Somebody had hung nets over the railing, and they were still wet. Two gulls stood
on the roof of the old mill and did not move. Further up the hill the first windows were lit, one after the other. A
cart came down the road with empty baskets. The baker had opened his door to let out the heat. Children would come by
later and ask for the broken loaves. For now the street was quiet, and one could hear the water under the bridge. The
man with the lantern stopped there and looked at the sky. It would be a clear day. He put out the light, because it
was not needed any more, and went home by the lower path. Behind him the harbour began to fill again. First the small
boats rose, then the larger ones. Ropes that had been slack grew tight. By the time the bell rang, all of them were
afloat.
"""
"""What stands between the facts when no text is given."""


class Filler:
    """Sentences of some documents with their lengths in tokens."""

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[str]) -> None:
        """Cut the documents into sentences.

        Raises:
            InputError: there is not one sentence in them.
        """
        lead = len(tokenizer.encode(""))
        self._sentences = [
            f" {sentence.strip()}"
            for document in documents
            for sentence in re.findall(r"[^.!?]+[.!?]+[\"'”’)]*", document[:_MOST_CHARACTERS])
        ]
        if not self._sentences:
            raise InputError("The text has not one sentence that ends in a full stop; give running prose.")
        self._sizes = [len(tokenizer.encode(sentence)) - lead for sentence in self._sentences]

    def pieces(self, sizes: Sequence[int], rng: Random) -> list[str]:
        """Consecutive text, cut at ends of sentences into pieces of about `sizes` tokens (0: none), never more in all.

        Reading starts at a sentence drawn by `rng` and goes round at the end.
        """
        place = rng.randrange(len(self._sentences))
        pieces = []
        used = 0
        for allowed in accumulate(sizes):
            words = []
            while used + self._sizes[place] <= allowed:
                words.append(self._sentences[place])
                used += self._sizes[place]
                place = (place + 1) % len(self._sentences)
            pieces.append("".join(words))
        return pieces

    def passage(self, size: int, rng: Random) -> str:
        """Sentences of at least `size` tokens together, in their order; those longer than that are left out."""
        place = rng.randrange(len(self._sentences))
        words: list[str] = []
        total = 0
        for offset in range(len(self._sentences)):
            index = (place + offset) % len(self._sentences)
            if self._sizes[index] > size:
                continue
            words.append(self._sentences[index])
            total += self._sizes[index]
            if total >= size:
                break
        return "".join(words) or self._sentences[place]
