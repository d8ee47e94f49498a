"""One step of reading prompts: dense causal attention, rows appended, the observation window shown to the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from alisa.cache.base import RowStore
from alisa.kernels.base import KeyBlock, PrefillKernel
from alisa.scheduler.plan import ScheduledChunk
from alisa.spec import AttentionShape

PAST_BLOCK_TOKENS = 1024
"""Cached tokens that prefill reads back at once: what it holds of the past does not grow with the prompt."""


class PrefillStep:
    """Chunks of prompts, packed one after the other.

    Args:
        store: the rows, already told about this step.
        append: `store.append`, timed.
        on_append: the policy state's, timed.
        observe_prompt: the policy state's, timed.
        kernel: attention.
        chunks: of the plan.
        observed_from: for each chunk, from which position on its rows of attention are shown to the policy; None: none.
        num_sets: J.
        shape: of the attention; a layer with a window is none of the policy's.
        device: of the model.
    """

    def __init__(
        self,
        store: RowStore,
        append: Callable[[int, Tensor, Tensor, Tensor], None],
        on_append: Callable[[int, Tensor, Tensor, Tensor, Tensor], None],
        observe_prompt: Callable[[int, int, int, int, Tensor], None],
        kernel: PrefillKernel,
        chunks: Sequence[ScheduledChunk],
        observed_from: Sequence[int | None],
        num_sets: int,
        shape: AttentionShape,
        device: torch.device,
    ) -> None:
        self._shape = shape
        self._store = store
        self._append = append
        self._on_append = on_append
        self._observe_prompt = observe_prompt
        self._kernel = kernel
        self._chunks = tuple(zip(chunks, observed_from, strict=True))
        self._num_sets = num_sets
        tokens = [(chunk.req_idx, position) for chunk in chunks for position in range(chunk.start, chunk.end)]
        self._req_index, self._positions = torch.tensor(tokens, device=device).unbind(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[1, T, H, D]`, k and v `[1, T, G, D]`; returns `[1, T, H, D]`."""
        q, k, v = q[0], k[0], v[0]
        out = torch.empty_like(q)
        self._append(layer, k, v, hidden[0])
        if self._shape.window(layer) is None:
            self._on_append(self._shape.among_full(layer), self._req_index, self._positions, k, v)
        start = 0
        for chunk, observed_from in self._chunks:
            span = slice(start, start + chunk.count)
            start = span.stop
            out[span] = self._chunk(layer, chunk, observed_from, q[span], k[span], v[span])
        return out[None]

    def _chunk(
        self, layer: int, chunk: ScheduledChunk, observed_from: int | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attention of one chunk `[t, H, D]`; the rows of its observation window go to the policy."""
        window = self._shape.window(layer)
        num_observed = 0 if observed_from is None or window is not None else chunk.end - observed_from
        past = partial(self._past, layer, chunk, window)
        own = KeyBlock(chunk.start, k, v)
        out, observed = self._kernel(q, own, past, num_observed, self._num_sets, window, self._shape.softcap)
        for first, start, mass in observed:
            self._observe_prompt(self._shape.among_full(layer), chunk.req_idx, first, start, mass)
        return out

    def _past(self, layer: int, chunk: ScheduledChunk, window: int | None) -> Iterator[KeyBlock]:
        """K and V of the tokens before the chunk that it sees some of, from wherever their rows lie.

        Blocks begin at the same positions for all chunks, so that a window changes no more than which ones there are.
        """
        first_seen = 0 if window is None else max(chunk.start + 1 - window, 0)
        for first in range(first_seen // PAST_BLOCK_TOKENS * PAST_BLOCK_TOKENS, chunk.start, PAST_BLOCK_TOKENS):
            k, v = self._store.read(layer, chunk.req_idx, first, min(first + PAST_BLOCK_TOKENS, chunk.start))
            yield KeyBlock(first, k, v)
