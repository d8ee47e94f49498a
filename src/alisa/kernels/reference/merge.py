"""Attention over rows that come in several pieces: partial softmaxes merge exactly by their log-sum-exp.

The arithmetic is that of flash decoding (Dao-AILab/flash-attention): L = logsumexp(L_i), out = sum exp(L_i - L) out_i.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PartialAttention:
    """The attention of N queries over all pieces added so far.

    Args:
        q: `[N, H, D]`, the queries; only their shape and device matter.
    """

    def __init__(self, q: Tensor) -> None:
        self.out = q.new_zeros(q.shape, dtype=torch.float32)
        """Float32[N, H, D]"""
        self.log_sum_exp = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        """Float32[N, H]"""
        self._is_empty = True

    def add(self, out: Tensor, log_sum_exp: Tensor, queries: Tensor | slice) -> None:
        """Take in a piece that these queries (Int64[n] or a slice) attended to: `[n, H, D]` and `[n, H]`."""
        if self._is_empty and len(out) == len(self.out):
            # Most prompts are one piece: nothing is there to merge it with.
            self.out.copy_(out)
            self.log_sum_exp.copy_(log_sum_exp)
            self._is_empty = False
            return
        self._is_empty = False
        former = self.log_sum_exp[queries]
        total = torch.logaddexp(former, log_sum_exp)
        kept, added = (former - total).exp()[..., None], (log_sum_exp - total).exp()[..., None]
        self.out[queries] = self.out[queries] * kept + out.float() * added
        self.log_sum_exp[queries] = total
