"""Logits that join the softmax of a head and read nothing, as in GPT-OSS (2508.10925) and 2309.17453.

A head with the sink s attends as one without it, times the part of its weight that the sink leaves to the tokens:

    out = sum_j exp(x_j) v_j / (exp(s) + sum_j exp(x_j)) = out_without * 1 / (1 + exp(s - L)),   L = log sum_j exp(x_j)

L is what every kernel returns or knows, so that no kernel has to know of sinks.
"""

from __future__ import annotations

from torch import Tensor


def with_sinks(out: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> Tensor:
    """The output `[N, H, D]` of heads with sinks Float32[H], whose scores have the log-sum-exp Float32[N, H]."""
    left = (sinks - log_sum_exp).exp_().add_(1).reciprocal_()
    return (out.float() * left[..., None]).to(out.dtype)
