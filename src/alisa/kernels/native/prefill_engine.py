"""The native prefill kernel as the engine calls it: bfloat16 goes there, everything else to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from alisa.kernels.base import KeyBlock, ObservedMass
from alisa.kernels.native.prefill import CpuPrefill
from alisa.kernels.reference.prefill import prefill_attention
from alisa.kernels.reference.sinks import with_sinks


class NativePrefill:
    """See `PrefillKernel`."""

    def __init__(self, kernel: CpuPrefill) -> None:
        self._kernel = kernel

    def __call__(
        self,
        q: Tensor,
        own: KeyBlock,
        section_len: int,
        past: Callable[[], Iterable[KeyBlock]],
        num_observed: int,
        num_sets: int,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Iterator[ObservedMass]]:
        """Rows of codes are read as float32: the past is rounded to bfloat16, as the model's own keys are.

        A row's result depends on the row and the keys it sees alone, so a piece needs to know nothing of its section.
        """
        if q.dtype != torch.bfloat16:
            return prefill_attention(q, own, section_len, past, num_observed, num_sets, window, softcap, sinks)
        earlier = (KeyBlock(block.start, block.k.to(q.dtype), block.v.to(q.dtype)) for block in past())
        out, log_sum_exp = self._kernel.attend(q, own, earlier, window, softcap)
        if sinks is not None:
            out = with_sinks(out, log_sum_exp, sinks)
        last = slice(len(q) - num_observed, None)
        blocks = chain(past(), (own,)) if num_observed else ()
        first = own.start + len(own.k) - num_observed
        return out, self._observed(q[last], log_sum_exp[last], first, blocks, num_sets, softcap)

    def _observed(
        self,
        q: Tensor,
        log_sum_exp: Tensor,
        first: int,
        blocks: Iterable[KeyBlock],
        num_sets: int,
        softcap: float | None,
    ) -> Iterator[ObservedMass]:
        for block in blocks:
            mass = self._kernel.mass(q, block.k.to(q.dtype), log_sum_exp, first - block.start, num_sets, softcap)
            yield ObservedMass(first, block.start, mass)
