"""What is left of the attention of long prompts that are read sparsely (`EngineConfig.sparse_prompts`).

Which blocks a prompt chooses follows from its text. What is assumed of it stands here, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from alisa.budget import DENSE_TOKENS
from alisa.errors import InputError

MEASURED_ALPHA = 0.03
"""Of which it is known what is left."""

_LEFT_BY_DOUBLING = 2 / 3
"""Of the products after the dense first tokens, with every doubling of the prompt: SmolLM2 made 67 % of them in 4096
tokens and 46 % in 8192 (benchmarks/results/sparse_prompts.jsonl). Gemma 3 270M made 99 %."""


@dataclass(frozen=True, slots=True)
class SparseReading:
    """How sparsely prompts are read.

    Raises:
        InputError: at construction, where nobody knows what is left, or the share is none.
    """

    alpha: float
    """As `EngineConfig.sparse_prompts`; 0: everything is read."""
    share: float | None = None
    """Of the products after the first `DENSE_TOKENS` tokens, those that are made; None: as was measured."""

    def __post_init__(self) -> None:
        if self.share is None and self.alpha not in (0, MEASURED_ALPHA):
            raise InputError(
                f"What --sparse-prompts {self.alpha:g} leaves of a prompt's attention was not measured, only what "
                f"{MEASURED_ALPHA:g} does; say it with --sparse-share."
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"--sparse-share is {self.share:g}, allowed is above 0 up to 1 (everything is read).")

    def share_left(self, length: int) -> float:
        """The share of the late products of a prompt of `length` tokens that are made; 1 up to `DENSE_TOKENS`."""
        if length <= DENSE_TOKENS:
            return 1.0
        if self.share is not None:
            return self.share
        return _LEFT_BY_DOUBLING ** log2(length / DENSE_TOKENS) if self.alpha else 1.0

    def pairs(self, length: int) -> float:
        """(query, key) pairs that a prompt of `length` tokens multiplies, in a layer that sees all of it."""
        dense = causal_pairs(min(length, DENSE_TOKENS))
        return dense + self.share_left(length) * (causal_pairs(length) - dense)


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a prompt of `length` tokens that is read densely."""
    return length * (length + 1) // 2
