"""From what a caller gives to what the scheduler takes: token ids, and how many may follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alisa.config import SamplingParams
from alisa.errors import InputError, RequestError
from alisa.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Checks prompts against a model and its engine."""

    tokenizer: Tokenizer | None
    """None: token ids only."""
    vocab_size: int
    """V"""
    max_model_len: int
    """Longest sequence, prompt and output together."""

    def read(self, prompt: str | Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], int]:
        """Token ids of a prompt, and the tokens that may follow: `max_tokens`, or fewer where the positions end.

        Raises:
            RequestError: the prompt is no prompt, is empty, too long, or has ids that the model does not know.
            InputError: a logit bias is for a token that the model does not know.
        """
        if unknown := [token_id for token_id, _ in params.logit_bias if token_id >= self.vocab_size]:
            raise InputError(f"logit_bias has token id {unknown[0]}; the model knows 0 to {self.vocab_size - 1}.")
        ids = self._encode(prompt)
        if not ids:
            raise RequestError("is empty, and the model has no token to begin with; give it some text.")
        if bad := [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]:
            raise RequestError(f"has token id {bad[0]}; the model knows 0 to {self.vocab_size - 1}.")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"has {len(ids)} tokens; the model has {self.max_model_len} positions, the output included. Shorten it "
                f"to at most {self.max_model_len - 1} tokens."
            )
        return ids, min(params.max_tokens, room)

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("is text, and this engine has no tokenizer; give token ids.")
            return tuple(self.tokenizer.encode(prompt))
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise RequestError(f"is of type {type(prompt).__name__}; give a text or a list of token ids.")
        # bool is an int to Python, and never meant as a token.
        if bad := [token_id for token_id in prompt if type(token_id) is not int]:
            raise RequestError(f"has {bad[0]!r} among its token ids; they are whole numbers.")
        return tuple(prompt)
