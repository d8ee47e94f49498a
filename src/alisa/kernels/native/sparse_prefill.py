"""The native prefill kernel on chosen blocks of earlier keys: bfloat16 goes there, everything else to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from alisa.kernels.base import KeyBlock
from alisa.kernels.native.prefill import CpuPrefill
from alisa.kernels.reference.sinks import with_sinks
from alisa.kernels.reference.sparse_prefill import BLOCK, sparse_prefill_attention


class NativeSparsePrefill:
    """See `SparsePrefillKernel`."""

    def __init__(self, kernel: CpuPrefill) -> None:
        self._kernel = kernel

    def __call__(
        self,
        q: Tensor,
        own: KeyBlock,
        past: Callable[[], Iterable[KeyBlock]],
        alpha: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Rows of codes are rounded to bfloat16, as the model's own keys are."""
        if q.dtype != torch.bfloat16:
            return sparse_prefill_attention(q, own, past, alpha, softcap, sinks)
        end = own.start + len(own.k)
        first_block = (end - len(q)) // BLOCK
        means = torch.cat([self._kernel.means(block.k.to(q.dtype)) for block in (*past(), own)])
        # A last block that is not whole reads all.
        chosen = torch.ones(-(-len(q) // BLOCK), own.k.shape[1], -(-end // BLOCK), dtype=torch.uint8)
        whole = len(q) // BLOCK * BLOCK
        self._kernel.choose(q[:whole], means, first_block, alpha, chosen[: whole // BLOCK], softcap)
        earlier = (KeyBlock(block.start, block.k.to(q.dtype), block.v.to(q.dtype)) for block in past())
        out, log_sum_exp = self._kernel.attend(q, own, earlier, None, softcap, chosen)
        return out if sinks is None else with_sinks(out, log_sum_exp, sinks)
