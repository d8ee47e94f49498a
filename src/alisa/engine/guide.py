"""Texts that follow a grammar: after each token a guide knows which tokens may come next.

The work is llguidance's (`alisa[grammar]`): a mask for the next token costs a fraction of a millisecond, and a JSON
schema or a regular expression is ready in a few milliseconds, so that nothing is compiled ahead or kept.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from alisa.config import SamplingParams
from alisa.errors import InputError
from alisa.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_JSON = {"whitespace_pattern": r"( |\n {0,24})?"}
"""Between the parts of a JSON text: nothing, a space, or a new line and its indentation. Where any white space may
come, small models fall into writing nothing else."""


class Guide:
    """Where one text stands in its grammar.

    Args:
        matcher: at the beginning.
        end_ids: tokens that end a text.
    """

    def __init__(self, matcher: LLMatcher, end_ids: Set[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot go on, in a word of llguidance; empty while it can."""
        # Not its sentence, which quotes the text: errors are logged, and texts are not.
        return self._matcher.stop_reason() if self._matcher.is_error() else ""

    def restrict(self, logits: Tensor) -> None:
        """Logits Float32[V] of tokens that may not come next are minus infinity, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, count=len(logits), bitorder="little"))
        if len(allowed) < len(logits):  # a model may have more rows than its tokenizer has tokens
            allowed = torch.nn.functional.pad(allowed, (0, len(logits) - len(allowed)))
        logits.masked_fill_(allowed.to(logits.device) == 0, -torch.inf)

    def accept(self, token_id: int) -> None:
        """The token has come."""
        if token_id not in self._end_ids:
            self._matcher.consume_token(token_id)


class GuideMaker:
    """Makes guides; what llguidance wants to know of the vocabulary is made with the first.

    Args:
        tokenizer: None: there is no text that could follow a grammar.
        end_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer | None, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._vocabulary: LLTokenizer | None = None

    def prepare(self) -> None:
        """What llguidance wants to know of the vocabulary is made now: of a large one it takes seconds.

        Raises:
            InputError: there is no tokenizer, or llguidance is not installed.
        """
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()

    def guide(self, params: SamplingParams) -> Guide | None:
        """At the beginning of a text; None where the parameters ask for no grammar.

        Raises:
            InputError: the grammar cannot be used, or llguidance is not installed.
        """
        if not params.is_guided:
            return None
        self.prepare()
        from llguidance import LLMatcher

        if params.regex is not None:
            name, grammar = "regex", LLMatcher.grammar_from_regex(params.regex)
        else:
            assert params.json_schema is not None, "a guided text has a grammar"
            try:
                name, grammar = "json_schema", LLMatcher.grammar_from_json_schema(params.json_schema, _JSON)
            except ValueError as error:
                raise InputError(f"json_schema cannot be used: {_first_line(str(error))}.") from error
        assert self._vocabulary is not None, "it has been prepared"
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"{name} cannot be used: {_first_line(matcher.get_error())}.")
        return Guide(matcher, self._end_ids)

    def _read_vocabulary(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InputError(
                "json_schema and regex need llguidance, which is not installed; pip install 'alisa[grammar]'."
            ) from error
        if self._tokenizer is None:
            raise InputError("json_schema and regex are for texts, and this engine has no tokenizer.")
        return LLTokenizer(self._tokenizer.to_json(), eos_token=sorted(self._end_ids) or None)


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "it has an error")
