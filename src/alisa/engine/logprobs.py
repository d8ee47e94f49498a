"""Log probabilities of tokens, as the model says them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alisa.outputs import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Instead of minus infinity, which JSON has not."""


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of the tokens in some places.

    Args:
        logits: Float32[N, V], what the model expects in each place.
        token_ids: the tokens that stand there.
        num_top: of how many of the likeliest to tell; of equal ones, any.
    """
    log_probs = logits.log_softmax(dim=-1).clamp_(min=LEAST_LOGPROB)
    chosen = log_probs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(num_top, log_probs.shape[1]))
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*found) for found in zip(token_ids, chosen, tops, strict=True)]
