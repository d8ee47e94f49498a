"""How long an output will be, guessed from its prompt: ridge regression on hashed tokens, learnt as requests end.

The logarithm of the length is a sum of weights: one for each token of the prompt (by a hash, whatever its place), one
for the prompt's length and one for the most tokens that it may get. Each finished request updates them (recursive least
squares), which is the ridge regression on all of them. It holds sums over hashed tokens, no prompts, and they are gone
with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_HASHED = 512
"""Weights of tokens. An update takes time with the square of their number."""

READ_TOKENS = 256
"""Tokens of a prompt that are looked at."""

_NUM_WEIGHTS = NUM_HASHED + 3
_HASH_FACTOR = 2654435761
"""2**32 over the golden ratio: neighbouring token ids lie far apart."""
_MOST_LOG = 20.0


class _Features(NamedTuple):
    places: NDArray[np.int64]
    values: NDArray[np.float64]


class LengthPredictor:
    """Weights, and how sure they are."""

    def __init__(self) -> None:
        self.num_learnt = 0
        """Requests that have taught something."""
        self._weights = np.zeros(_NUM_WEIGHTS)
        self._covariance = np.eye(_NUM_WEIGHTS)
        self._covariance[-1, -1] = 100.0  # the constant may be anything

    def predict(self, prompt_ids: Sequence[int], max_new_tokens: int) -> float:
        """Tokens that the output is likely to have, 1 to `max_new_tokens`."""
        return min(max(exp(self._log_length(_features(prompt_ids, max_new_tokens))), 1.0), max_new_tokens)

    def learn(self, prompt_ids: Sequence[int], max_new_tokens: int, num_tokens: int, *, was_cut: bool) -> None:
        """An output has ended with so many tokens; `was_cut`: it would have had more."""
        features = _features(prompt_ids, max_new_tokens)
        error = log(num_tokens) - self._log_length(features)
        self.num_learnt += 1
        if was_cut and error < 0:  # it says no more than what is known
            return
        turned = self._covariance[:, features.places] @ features.values
        gain = turned / (1.0 + turned[features.places] @ features.values)
        self._weights += gain * error
        self._covariance -= np.outer(gain, turned)

    def _log_length(self, features: _Features) -> float:
        return min(float(self._weights[features.places] @ features.values), _MOST_LOG)


def _features(prompt_ids: Sequence[int], max_new_tokens: int) -> _Features:
    """Where a prompt's features are not zero, and what they are: those of tokens have length 1 together."""
    tokens = np.unique(np.asarray(prompt_ids[:READ_TOKENS], np.int64))
    places, counts = np.unique(tokens * _HASH_FACTOR % 2**32 % NUM_HASHED, return_counts=True)
    hashed = counts / np.linalg.norm(counts)
    others = (log(len(prompt_ids)) / 3, log(max_new_tokens) / 3, 1.0)
    return _Features(np.append(places, range(NUM_HASHED, _NUM_WEIGHTS)), np.append(hashed, others))
