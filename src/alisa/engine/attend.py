"""What the model's `attend` is: the paper on one screen.

The decoder hands over q, k and v of one layer and gets the attention output back; it does not know that a cache exists.
`PrefillAttend` reads prompts, `DecodeAttend` makes one step of Sparse Window Attention (or of any other policy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alisa.attention.decode import DecodeKernel
from alisa.attention.prefill import KeyBlock, PrefillKernel
from alisa.engine.recorder import Part, Stopwatch
from alisa.kv.base import Part as RowPart
from alisa.kv.base import RowStore
from alisa.policy.base import PolicyState
from alisa.types import Attended, Segment, Selection, StepBatch

PAST_BLOCK_TOKENS = 1024
"""Cached tokens that prefill reads back at once: what it holds of the past does not grow with the prompt."""


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """A piece of a prompt, and from which position on its rows of attention seed the policy (None: none of them)."""

    segment: Segment
    seed_from: int | None


class PrefillAttend:
    """Dense causal attention over pieces of prompts, packed one behind the other: q `[1, T, H, D]`."""

    def __init__(
        self,
        store: RowStore,
        state: PolicyState,
        num_sets: int,
        pieces: tuple[PrefillSegment, ...],
        kernel: PrefillKernel,
        device: torch.device,
        watch: Stopwatch,
    ) -> None:
        self._store = store
        self._state = state
        self._kernel = kernel
        self._num_sets = num_sets
        self._pieces = pieces
        self._watch = watch
        segments = [piece.segment for piece in pieces]
        places = [(segment.lane, position) for segment in segments for position in range(segment.start, segment.end)]
        self._lane_ids, self._positions = torch.tensor(places, device=device).unbind(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer of prefill; k and v `[1, T, G, D]`, returns `[1, T, H, D]`."""
        q, k, v = q[0], k[0], v[0]
        out = torch.empty_like(q)
        with self._watch.measure(Part.ATTENTION):
            self._store.append(layer, k, v, hidden[0])
        with self._watch.measure(Part.SELECTION):
            self._state.remember(layer, self._lane_ids, self._positions, k, v)
        start = 0
        for piece in self._pieces:
            span = slice(start, start + piece.segment.count)
            start = span.stop
            out[span] = self._piece(layer, piece, q[span], k[span], v[span])
        return out[None]

    def _piece(self, layer: int, piece: PrefillSegment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one piece `[t, H, D]`; its last rows seed the policy."""
        segment = piece.segment
        num_seeds = 0 if piece.seed_from is None else segment.end - piece.seed_from
        own = KeyBlock(segment.start, k, v)
        with self._watch.measure(Part.ATTENTION):
            out, seeds = self._kernel(q, own, partial(self._past, layer, segment), num_seeds, self._num_sets)
        with self._watch.measure(Part.SELECTION):
            for first, start, mass in seeds:
                self._state.seed(layer, segment.lane, first, start, mass)
        return out

    def _past(self, layer: int, segment: Segment) -> Iterator[KeyBlock]:
        """K and V of the tokens before the piece, from wherever their rows lie."""
        for first in range(0, segment.start, PAST_BLOCK_TOKENS):
            k, v = self._store.read(layer, segment.lane, first, min(first + PAST_BLOCK_TOKENS, segment.start))
            yield KeyBlock(first, k, v)


class DecodeAttend:
    """One new token per sequence: write its row, choose what to read, read it in place, remember what it showed.

    Args:
        store: the rows, already told about this step.
        state: what the policy knows, already told about this step.
        batch: the sequences.
        kernel: attention over rows by slot.
        watch: where the time goes.
        chosen: selections of all layers that are known already; None: the state is asked in every layer.
        keeps_mass: whether the policy wants to see the attention mass.
    """

    def __init__(
        self,
        store: RowStore,
        state: PolicyState,
        batch: StepBatch,
        kernel: DecodeKernel,
        watch: Stopwatch,
        *,
        chosen: Sequence[Selection] | None,
        keeps_mass: bool,
    ) -> None:
        self._store = store
        self._state = state
        self._kernel = kernel
        self._watch = watch
        self._chosen = chosen
        self._keeps_mass = keeps_mass
        self.tokens_attended = [0] * len(batch.lanes)
        """Cached tokens read for each sequence, summed over the layers so far."""
        self._lane_ids, self._positions = batch.lane_ids, batch.length_counts.to(torch.int64) - 1

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer of decode: q `[B, 1, H, D]`, k and v `[B, 1, G, D]`, returns `[B, 1, H, D]`."""
        query = q[:, 0]
        with self._watch.measure(Part.ATTENTION):
            self._store.append(layer, k[:, 0], v[:, 0], hidden[:, 0])
        with self._watch.measure(Part.SELECTION):
            self._state.remember(layer, self._lane_ids, self._positions, k[:, 0], v[:, 0])
            selection = self._chosen[layer] if self._chosen is not None else self._state.select(layer, query)
        attended = self._attend(layer, query, selection)
        with self._watch.measure(Part.SELECTION):
            self._state.observe(layer, selection, attended.mass)
            out = self._state.complete(layer, attended)
        for row, count in enumerate(selection.num_tokens):
            self.tokens_attended[row] += count
        return out[:, None]

    def _attend(self, layer: int, query: Tensor, selection: Selection) -> Attended:
        """Attention over the selected rows, in one part or piece by piece: the result is the same, to the last bit."""
        parts = self._store.parts(layer, selection)
        part = self._next(parts)
        assert part is not None, "every sequence reads at least its own token"
        if part.span is None:
            with self._watch.measure(Part.ATTENTION):
                return self._kernel(query, part.rows, self._store.codec, part.slots, selection.counts)
        pieces = self._kernel.in_pieces(query, self._store.codec, selection.counts, part.slots.shape[2])
        while part is not None:
            assert part.span is not None, "a selection is one part or all of it is pieces"
            with self._watch.measure(Part.ATTENTION):
                pieces.add(part.rows, part.slots, part.span.begins, part.span.ends)
            part = self._next(parts)
        with self._watch.measure(Part.ATTENTION):
            return pieces.finish()

    def _next(self, parts: Iterator[RowPart]) -> RowPart | None:
        """The next part, once its rows are there."""
        with self._watch.measure(Part.TRANSFER):
            return next(parts, None)
