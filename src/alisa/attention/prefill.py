"""One step of reading prompts: dense causal attention, rows appended, the observation window shown to the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.cache.base import RowStore
from alisa.kernels.base import KeyBlock, PrefillKernel
from alisa.scheduler.plan import ScheduledChunk
from alisa.spec import AttentionShape

SECTION_TOKENS = 1024
"""Attention of a prompt is cut at multiples of this, whatever steps it is read in, so that steps change no bit of it.

A token sees the keys of its own section as the model made them, and those of earlier sections as their rows hold them,
one section after the other: what prefill holds of the past does not grow with the prompt.
"""


def chunk_tokens(wanted: int, row_dtype: str, dtype: torch.dtype, *, unit: int = 1) -> int:
    """Prompt tokens that a step may read, of a model that computes in `dtype` and keeps its rows in `row_dtype`.

    A multiple of `unit`, which divides a section. Keys of a section's earlier tokens come out of their rows. Where rows
    are rounded, that would be other keys than a section read in one step sees, so there a step reads whole sections.
    """
    multiple = unit if is_exact(row_dtype, dtype) else SECTION_TOKENS
    return -(-wanted // multiple) * multiple


def is_exact(row_dtype: str, dtype: torch.dtype) -> bool:
    """Whether rows hold K and V as a model that computes in `dtype` made them."""
    return str(dtype) == f"torch.{row_dtype}"


class PrefillStep:
    """Chunks of prompts, packed one after the other.

    Args:
        store: the rows, already told about this step.
        append: `store.append`, timed.
        on_append: the policy state's, timed.
        observe_prompt: the policy state's, timed.
        kernel: attention.
        chunks: of the plan.
        prompt_lens: of each chunk's sequence.
        observed_from: for each chunk, from which position on its rows of attention are shown to the policy; None: none.
        num_sets: J.
        shape: of the attention; a layer with a window is none of the policy's.
        sinks: of each layer, Float32[H]; None: the model has none.
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
        prompt_lens: Sequence[int],
        observed_from: Sequence[int | None],
        num_sets: int,
        shape: AttentionShape,
        sinks: Sequence[Tensor] | None,
        device: torch.device,
    ) -> None:
        self._shape = shape
        self._sinks = sinks
        self._store = store
        self._append = append
        self._on_append = on_append
        self._observe_prompt = observe_prompt
        self._kernel = kernel
        self._pieces = tuple(
            piece
            for chunk, prompt_len, first in zip(chunks, prompt_lens, observed_from, strict=True)
            for piece in _pieces(chunk, prompt_len, first)
        )
        self._num_sets = num_sets
        self._req_index, self._positions = token_places(chunks, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[1, T, H, D]`, k and v `[1, T, G, D]`; returns `[1, T, H, D]`."""
        q, k, v = q[0], k[0], v[0]
        out = torch.empty_like(q)
        self._append(layer, k, v, hidden[0])
        if self._shape.window(layer) is None:
            self._on_append(self._shape.among_full(layer), self._req_index, self._positions, k, v)
        start = 0
        for piece in self._pieces:
            span = slice(start, start + piece.end - piece.start)
            start = span.stop
            out[span] = self._piece(layer, piece, q[span], k[span], v[span])
        return out[None]

    def _piece(self, layer: int, piece: _Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one piece `[t, H, D]`; the rows of its observation window go to the policy."""
        if piece.start > piece.section_start:
            earlier_k, earlier_v = self._store.read(layer, piece.req_idx, piece.section_start, piece.start)
            k, v = torch.cat((earlier_k.to(k.dtype), k)), torch.cat((earlier_v.to(v.dtype), v))
        window, softcap = self._shape.window(layer), self._shape.softcap
        num_observed = piece.num_observed if window is None else 0
        own = KeyBlock(piece.section_start, k, v)
        section_len = piece.section_end - piece.section_start
        past = partial(self._past, layer, piece, window)
        sinks = None if self._sinks is None else self._sinks[layer]
        out, observed = self._kernel(q, own, section_len, past, num_observed, self._num_sets, window, softcap, sinks)
        for first, start, mass in observed:
            self._observe_prompt(self._shape.among_full(layer), piece.req_idx, first, start, mass)
        return out

    def _past(self, layer: int, piece: _Piece, window: int | None) -> Iterator[KeyBlock]:
        """K and V of the sections before the piece's, from wherever their rows lie.

        With a window, those that its section sees something of: the same for all pieces of it.
        """
        first_seen = 0 if window is None else max(piece.section_start + 1 - window, 0)
        for first in range(first_seen // SECTION_TOKENS * SECTION_TOKENS, piece.section_start, SECTION_TOKENS):
            k, v = self._store.read(layer, piece.req_idx, first, first + SECTION_TOKENS)
            yield KeyBlock(first, k, v)


def token_places(chunks: Sequence[ScheduledChunk], device: torch.device) -> tuple[Tensor, Tensor]:
    """Request index and position Int64[T] of every token of these chunks, packed one after the other."""
    tokens = [(chunk.req_idx, position) for chunk in chunks for position in range(chunk.start, chunk.end)]
    req_index, positions = torch.tensor(tokens, device=device).unbind(1)
    return req_index, positions


class _Piece(NamedTuple):
    """Tokens [start, end) of a chunk that lie in one section of their prompt."""

    req_idx: int
    start: int
    end: int
    section_start: int
    section_end: int
    num_observed: int
    """How many of the last rows are shown to the policy."""


def _pieces(chunk: ScheduledChunk, prompt_len: int, observed_from: int | None) -> Iterator[_Piece]:
    assert chunk.end <= prompt_len, "what is read as a prompt is part of it"
    start = chunk.start
    while start < chunk.end:
        section_start = start // SECTION_TOKENS * SECTION_TOKENS
        section_end = min(section_start + SECTION_TOKENS, prompt_len)
        end = min(chunk.end, section_end)
        num_observed = 0 if observed_from is None else max(0, end - max(start, observed_from))
        yield _Piece(chunk.req_idx, start, end, section_start, section_end, num_observed)
        start = end
