"""Choosing the next token, for a batch in which every request has its own rules.

A request's random numbers come from its own counter-based generator, keyed by its seed and the number of the token, so
they depend on nothing else in the batch and are the same after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alisa.config import SamplingParams


def sample(
    logits: Tensor, params: Sequence[SamplingParams], token_ids: Sequence[Sequence[int]], drawn: Sequence[int]
) -> list[int | None]:
    """One token id per row; None where the logits say nothing, because one is not a number or is plus infinity.

    Args:
        logits: Float32[B, V]; changed in place.
        params: rules of each row.
        token_ids: prompt and output of each row so far, for the repetition penalty.
        drawn: number of tokens each row has already generated; the counter of its random numbers.
    """
    for row, rules in enumerate(params):
        if rules.repetition_penalty != 1:
            _penalise(logits[row], token_ids[row], rules.repetition_penalty)
    # One pass tells both: NaN wins every comparison, and so does plus infinity. (`max` is up to three times slower.)
    likeliest = logits.argmax(dim=-1, keepdim=True)
    largest = logits.gather(-1, likeliest).flatten().tolist()
    chosen: list[int | None] = likeliest.flatten().tolist()
    for row, rules in enumerate(params):
        if not math.isfinite(largest[row]):
            chosen[row] = None
        elif rules.temperature > 0:
            chosen[row] = _draw(logits[row], rules, uniform(rules.seed, drawn[row]))
    return chosen


def uniform(seed: int, counter: int) -> float:
    """The random number in [0, 1) of one token of one request."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=counter)).random())


def _penalise(logits: Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """CTRL's repetition penalty (arXiv 1909.05858), on every token seen, in place."""
    seen = torch.tensor(sorted(set(token_ids)), device=logits.device)
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _draw(logits: Tensor, rules: SamplingParams, number: float) -> int:
    """Inverse of the cumulative distribution at `number`, over what top-k, top-p and min-p leave."""
    num_kept = min(rules.top_k or len(logits), len(logits))
    values, ids = (logits / rules.temperature).topk(num_kept)
    probs = values.double().softmax(dim=-1)
    # Sorted from likely to unlikely, so each filter keeps a prefix; the likeliest token always stays.
    keep = (probs.cumsum(dim=-1) - probs < rules.top_p) & (probs >= rules.min_p * probs[0])
    cumulative = (probs * keep).cumsum(dim=-1)
    index = torch.searchsorted(cumulative, number * cumulative[-1], right=True)
    return int(ids[min(int(index), int(keep.sum()) - 1)])
