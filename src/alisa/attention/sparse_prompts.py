"""Long prompts that are read sparsely: `EngineConfig.sparse_prompts`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from alisa.budget import DENSE_TOKENS
from alisa.kernels.base import KeyBlock, ObservedMass, PrefillKernel, SparsePrefillKernel
from alisa.kernels.choose import AttentionBackend
from alisa.kernels.reference.sparse_prefill import BLOCK

QUERY_BLOCK_TOKENS = BLOCK
"""Tokens that share a choice; pieces of a prompt end where these blocks do."""


class SparsePrompts:
    """A `PrefillKernel` that reads sparsely what comes late in a prompt, in layers without a window.

    Args:
        dense: for everything else.
        sparse: pieces of prompts come to it in whole blocks but for the last.
        alpha: see `SparsePrefillKernel`.
    """

    def __init__(self, dense: PrefillKernel, sparse: SparsePrefillKernel, alpha: float) -> None:
        self._dense = dense
        self._sparse = sparse
        self._alpha = alpha

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
        """See `PrefillKernel`."""
        if own.start < DENSE_TOKENS or window is not None:
            return self._dense(q, own, section_len, past, num_observed, num_sets, window, softcap, sinks)
        first = own.start + len(own.k) - len(q)
        assert first % QUERY_BLOCK_TOKENS == 0, "pieces end where blocks of queries do"
        assert not num_observed, "policies that look at the attention of prompts are refused"
        return self._sparse(q, own, past, self._alpha, softcap, sinks), iter(())


def with_sparse_prompts(backend: AttentionBackend, alpha: float | None) -> AttentionBackend:
    """The same kernels, with which prompts are read sparsely; None: as they are."""
    if alpha is None:
        return backend
    return backend._replace(prefill=SparsePrompts(backend.prefill, backend.sparse_prefill, alpha))
