"""Scores and logits that are bent to stay below a cap, as in Gemma 2 (2408.00118)."""

from __future__ import annotations

from torch import Tensor


def softcapped(x: Tensor, cap: float) -> Tensor:
    """Cap * tanh(x / cap) of float32 numbers; changes x.

    By the exponential: torch's own tanh gives the last elements of a thread's share other last bits than the others.
    """
    return x.mul_(2 / cap).exp_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)
