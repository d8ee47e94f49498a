"""What the model's `attend` is: the paper on one screen.

The decoder hands over q, k and v of one layer and gets the attention output back; it does not know that a cache exists.
`PrefillAttend` reads prompts, `DecodeAttend` makes one step of Sparse Window Attention (or of any other policy).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alisa.attention.decode import DecodeKernel
from alisa.attention.prefill import causal_attention, causal_mass
from alisa.engine.recorder import Part, Stopwatch
from alisa.kv.store import KVStore, RowWriter
from alisa.policy.base import PolicyState
from alisa.types import Segment, StepBatch


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """A piece of a prompt, and from which position on its rows of attention seed the policy (None: none of them)."""

    segment: Segment
    seed_from: int | None


class PrefillAttend:
    """Dense causal attention over pieces of prompts, packed one behind the other: q `[1, T, H, D]`."""

    def __init__(
        self,
        store: KVStore,
        state: PolicyState,
        num_sets: int,
        pieces: tuple[PrefillSegment, ...],
        watch: Stopwatch,
    ) -> None:
        self._store = store
        with watch.measure(Part.ATTENTION):
            self._writer: RowWriter = store.extend([piece.segment for piece in pieces])
        self._state = state
        self._num_sets = num_sets
        self._pieces = pieces
        self._watch = watch
        segments = [piece.segment for piece in pieces]
        places = [(segment.lane, position) for segment in segments for position in range(segment.start, segment.end)]
        self._lane_ids, self._positions = torch.tensor(places, device=store.device).unbind(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer of prefill; k and v `[1, T, G, D]`, returns `[1, T, H, D]`."""
        q, k, v = q[0], k[0], v[0]
        out = torch.empty_like(q)
        with self._watch.measure(Part.ATTENTION):
            self._writer.append(layer, k, v)
        with self._watch.measure(Part.SELECTION):
            self._state.remember(layer, self._lane_ids, self._positions, k)
        start = 0
        for piece in self._pieces:
            segment = piece.segment
            span = slice(start, start + segment.count)
            start = span.stop
            with self._watch.measure(Part.ATTENTION):
                keys, values = k[span], v[span]
                if segment.start:
                    past_k, past_v = self._store.read(layer, segment.lane, segment.start)
                    keys = torch.cat((past_k.to(k.dtype), keys))
                    values = torch.cat((past_v.to(v.dtype), values))
                out[span] = causal_attention(q[span], keys, values)
            if piece.seed_from is not None:
                with self._watch.measure(Part.SELECTION):
                    rows = q[span][piece.seed_from - segment.start :]
                    for first, mass in causal_mass(rows, keys, self._num_sets):
                        self._state.seed(layer, segment.lane, first, mass)
        return out[None]


class DecodeAttend:
    """One new token per sequence: write its row, choose what to read, read it in place, remember what it showed."""

    def __init__(
        self, store: KVStore, state: PolicyState, batch: StepBatch, kernel: DecodeKernel, watch: Stopwatch
    ) -> None:
        self._store = store
        with watch.measure(Part.ATTENTION):
            self._writer: RowWriter = store.extend(
                [Segment(lane, length - 1, 1) for lane, length in zip(batch.lanes, batch.lengths, strict=True)]
            )
            self._table = store.slot_table(batch.lane_ids, max(batch.lengths))
        self._state = state
        self._kernel = kernel
        self._watch = watch
        self.tokens_attended = [0] * len(batch.lanes)
        """Cached tokens read for each sequence, summed over the layers so far."""
        self._lane_ids, self._positions = batch.lane_ids, batch.length_counts.to(torch.int64) - 1
        with watch.measure(Part.SELECTION):
            state.begin(batch)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer of decode: q `[B, 1, H, D]`, k and v `[B, 1, G, D]`, returns `[B, 1, H, D]`."""
        query = q[:, 0]
        with self._watch.measure(Part.ATTENTION):
            self._writer.append(layer, k[:, 0], v[:, 0])
        with self._watch.measure(Part.SELECTION):
            self._state.remember(layer, self._lane_ids, self._positions, k[:, 0])
            selection = self._state.select(layer, query)
        with self._watch.measure(Part.ATTENTION):
            num_seqs, num_sets, num_slots = selection.positions.shape
            slots = self._table.gather(1, selection.positions.view(num_seqs, -1).to(torch.int64))
            slots = slots.view(num_seqs, num_sets, num_slots)
            attended = self._kernel(query, self._store.rows(layer), self._store.codec, slots, selection.counts)
        with self._watch.measure(Part.SELECTION):
            self._state.observe(layer, selection, attended.mass)
        for row, count in enumerate(selection.num_tokens):
            self.tokens_attended[row] += count
        return attended.out[:, None]
