"""Windows of a text: the units that perplexity and attention are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from alisa.errors import InputError
from alisa.lab.scoring import ScoredItem
from alisa.model.tokenizer import Tokenizer


class Window(NamedTuple):
    """Consecutive tokens of a text after the model's leading token; what is scored, and how long it is as text."""

    item: ScoredItem
    scored_bytes: int


def cut_windows(
    tokenizer: Tokenizer, documents: Sequence[str], *, context: int, prefill: int, count: int | None
) -> list[Window]:
    """Windows of `context` tokens, each after the model's leading token if it has one.

    Documents follow each other with a line feed between them and are cut into consecutive windows, of which `count` are
    taken at even distances, so that a few windows speak for the whole text. The first `prefill` tokens of a window are
    its prompt, the rest is scored.

    Raises:
        InputError: the text is shorter than one window.
    """
    lead = tokenizer.encode("")
    ids = tokenizer.encode("\n".join(documents))[len(lead) :]
    stride = context - len(lead)
    chunks = [ids[start : start + stride] for start in range(0, len(ids) - stride + 1, stride)]
    if not chunks:
        raise InputError(
            f"The text has {len(ids)} tokens, less than one window of {context}; give more text or a smaller --context."
        )
    if count is not None and count < len(chunks):
        chunks = [chunks[index * len(chunks) // count] for index in range(count)]
    return [_window(tokenizer, [*lead, *chunk], prefill) for chunk in chunks]


def _window(tokenizer: Tokenizer, ids: list[int], prefill: int) -> Window:
    item = ScoredItem(ids[:prefill], ids[prefill:])
    num_bytes = [len(tokenizer.decode(part).encode()) for part in (ids, ids[:prefill])]
    return Window(item, num_bytes[0] - num_bytes[1])
