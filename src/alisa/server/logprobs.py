"""Log probabilities as OpenAI's clients expect them, of texts and of chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alisa.model.tokenizer import Tokenizer
from alisa.outputs import TokenLogprob


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A single token; a part of a character becomes a replacement character."""
    return tokenizer.token_bytes[token_id].decode(errors="replace")


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], *, offset: int, first_id: int | None = None
) -> dict[str, Any]:
    """The object `logprobs` of a completion.

    Args:
        tokenizer: writes the tokens.
        tokens: with their log probabilities.
        offset: characters of the text before them.
        first_id: a token before all of them, which nothing is known of: the first of an echoed prompt.
    """
    first = [] if first_id is None else [token_text(tokenizer, first_id)]
    texts = [*first, *(token_text(tokenizer, token.token_id) for token in tokens)]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    nothing = [None] * len(first)
    return {
        "tokens": texts,
        "token_logprobs": [*nothing, *(token.logprob for token in tokens)],
        "top_logprobs": [*nothing, *(_top(tokenizer, token) for token in tokens)],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The object `logprobs` of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes[token_id]
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": [*data]}

    content = [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*top) for top in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """The list that vLLM gives for a prompt; it begins with nothing."""
    found: list[dict[str, Any] | None] = [None]
    for token in tokens:
        pairs = {token.token_id: token.logprob, **dict(token.top)}
        found.append(
            {
                str(token_id): {"logprob": logprob, "decoded_token": token_text(tokenizer, token_id)}
                for token_id, logprob in pairs.items()
            }
        )
    return found


def _top(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the one that stands there; of two that are written alike, the likelier."""
    found: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        text = token_text(tokenizer, token_id)
        found[text] = max(logprob, found.get(text, logprob))
    return found
