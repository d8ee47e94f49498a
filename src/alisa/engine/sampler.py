"""Choosing the next token, for a batch in which every request has its own rules.

A request's random numbers come from its own counter-based generator, keyed by its seed and the number of the token, so
they depend on nothing else in the batch and are the same after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alisa.config import SamplingParams
from alisa.engine.guide import Guide
from alisa.engine.logprobs import token_logprobs
from alisa.outputs import TokenLogprob

_LIKELY = 1024
"""Tokens that a draw is looked for among first. It seldom falls on another, and to sort a whole vocabulary takes
milliseconds, which is as long as a step of a small model."""


class SampledRow(NamedTuple):
    """What choosing the next token of a request depends on."""

    params: SamplingParams
    token_ids: Sequence[int]
    """Prompt and output so far."""
    num_output: int = 0
    """Tokens of these that were drawn; the counter of the random numbers."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that would end it."""
    guide: Guide | None = None


class SampledTokens(NamedTuple):
    """The next token of each row."""

    token_ids: list[int | None]
    """None where the logits say nothing, because one is not a number or is plus infinity."""
    logprobs: dict[int, TokenLogprob]
    """By row, for those that ask for it."""


def sample(logits: Tensor, rows: Sequence[SampledRow]) -> SampledTokens:
    """One token for each row of logits Float32[B, V], which are changed in place."""
    plain: dict[int, Tensor] = {}
    for index, row in enumerate(rows):
        if row.params.logprobs is not None:
            plain[index] = logits[index : index + 1].clone()
        if row.params.changes_logits:
            _adjust(logits[index], row)
    # One pass tells both: NaN wins every comparison, and so does plus infinity. (`max` is up to three times slower.)
    likeliest = logits.argmax(dim=-1, keepdim=True)
    largest = logits.gather(-1, likeliest).flatten().tolist()
    chosen: list[int | None] = likeliest.flatten().tolist()
    for index, row in enumerate(rows):
        if not math.isfinite(largest[index]):
            chosen[index] = None
        elif row.params.temperature > 0:
            chosen[index] = _draw(logits[index], row.params, uniform(row.params.seed, row.num_output))
    found = {
        index: token_logprobs(row, [token_id], rows[index].params.logprobs or 0)[0]
        for index, row in plain.items()
        if (token_id := chosen[index]) is not None
    }
    return SampledTokens(chosen, found)


def uniform(seed: int, counter: int) -> float:
    """The random number in [0, 1) of one token of one request."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=counter)).random())


def _adjust(logits: Tensor, row: SampledRow) -> None:
    """All that changes the logits Float32[V] of a row before temperature and filters, in place."""
    params = row.params
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, _on(logits, ids), torch.tensor(biases, device=logits.device))
    if params.repetition_penalty != 1 and row.token_ids:
        _penalise(logits, row.token_ids, params.repetition_penalty)
    if row.num_output and (params.presence_penalty or params.frequency_penalty):
        seen, counts = _on(logits, row.token_ids[-row.num_output :]).unique(return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if row.num_output < params.min_tokens and row.end_ids:
        logits[_on(logits, sorted(row.end_ids))] = -torch.inf
    if row.guide is not None:
        row.guide.restrict(logits)


def _penalise(logits: Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """CTRL's repetition penalty (arXiv 1909.05858), on every token seen, in place."""
    seen = _on(logits, sorted(set(token_ids)))
    values = logits[seen]
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _on(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Int64[N] on the device of the logits."""
    return torch.tensor(token_ids, dtype=torch.int64, device=logits.device)


def _draw(logits: Tensor, rules: SamplingParams, number: float) -> int:
    """Inverse of the cumulative distribution at `number`, over what top-k, top-p and min-p leave."""
    scaled = logits / rules.temperature
    num_kept = min(rules.top_k or len(logits), len(logits))
    if len(logits) == num_kept > _LIKELY:
        ids = scaled.topk(_LIKELY).indices
        index = _place(scaled.double().softmax(dim=-1)[ids], rules, number, is_all=False)
        if index is not None:
            return int(ids[index])
    values, ids = scaled.topk(num_kept)
    index = _place(values.double().softmax(dim=-1), rules, number, is_all=True)
    assert index is not None, "there are no others"
    return int(ids[index])


def _place(probs: Tensor, rules: SamplingParams, number: float, *, is_all: bool) -> int | None:
    """Where among probs Float64[N], from likely to unlikely, the draw falls; None: it may be one of those not here."""
    cumulative = probs.cumsum(dim=-1)
    # Each filter keeps a prefix; the likeliest token always stays.
    keep = (cumulative - probs < rules.top_p) & (probs >= rules.min_p * probs[0])
    num_kept = int(keep.sum())
    if num_kept < len(probs) or is_all:
        point = number * cumulative[num_kept - 1]
    elif rules.top_p < 1 or rules.min_p > 0:
        return None
    else:
        point = cumulative.new_tensor(number)  # of 1, which all of them add up to
    index = int(torch.searchsorted(cumulative, point, right=True))
    if index == len(probs) and not is_all:
        return None
    return min(index, num_kept - 1)
