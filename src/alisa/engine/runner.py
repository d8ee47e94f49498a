"""Tokens in, logits out: one pass of the decoder over cached sequences, with the policy deciding what is read.

The engine and the teacher-forced scorer drive the same two calls, so what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.session import DecodeAttend, PrefillAttend, PrefillSegment
from alisa.attention.timing import Part, Stopwatch
from alisa.cache.base import RowStore
from alisa.kernels.base import DecodeKernel, PrefillKernel, Selection, StepBatch
from alisa.model.decoder import Decoder
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.scheduler.plan import Segment, StepPlan


class PromptPiece(NamedTuple):
    """Consecutive tokens of one prompt."""

    segment: Segment
    token_ids: Sequence[int]
    prompt_len: int


class Decoded(NamedTuple):
    """Logits Float32[B, V] of one decode step, and the cached tokens each sequence read, summed over layers."""

    logits: Tensor
    tokens_attended: list[int]


class _Ahead(NamedTuple):
    """Selections of every layer for a step that has not come yet."""

    req_indices: tuple[int, ...]
    lengths: tuple[int, ...]
    selections: tuple[Selection, ...]


class ModelRunner:
    """A decoder, a store, and a policy with its state, wired together by `attend`.

    Args:
        decoder: the model.
        policy: which tokens are read.
        store: where their rows lie.
        state: what the policy remembers.
        prefill_kernel: attention while prompts are read.
        kernel: decode attention.
        watch: where the time goes.
        looks_ahead: with a policy that decides by history, choose a step's tokens when the step before it has been
            through all layers, and let the store fetch what is missing while logits and tokens are computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: SelectionPolicy,
        store: RowStore,
        state: PolicyState,
        prefill_kernel: PrefillKernel,
        kernel: DecodeKernel,
        watch: Stopwatch,
        *,
        looks_ahead: bool = False,
    ) -> None:
        self.decoder = decoder
        self.policy = policy
        self.store = store
        self.state = state
        self.prefill_kernel = prefill_kernel
        self.kernel = kernel
        self.watch = watch
        self._looks_ahead = looks_ahead and not policy.query_aware
        self._ahead: _Ahead | None = None

    def begin(self, plan: StepPlan) -> None:
        """The store has room for the plan's tokens, and its moves are under way; `prefill` or `decode` comes next."""
        with self.watch.measure(Part.BEGIN):
            self.store.begin(plan)

    def prefill(self, pieces: Sequence[PromptPiece]) -> Tensor:
        """Read pieces of prompts, packed; logits Float32[N, V] of the N prompts that are complete now, in order."""
        # A prompt may have the request index, and come to the length, of a sequence that the choice made ahead was for.
        self._ahead = None
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for piece in pieces:
            tokens += piece.token_ids
            positions += range(piece.segment.start, piece.segment.end)
            if piece.segment.end == piece.prompt_len:
                last_rows.append(len(tokens) - 1)
        with self.watch.measure(Part.MODEL):
            attend = PrefillAttend(
                self.store,
                self.state,
                self.policy.num_sets(self.decoder.spec.attention),
                tuple(PrefillSegment(piece.segment, self._seed_from(piece)) for piece in pieces),
                self.prefill_kernel,
                self.decoder.device,
                self.watch,
            )
            hidden = self.decoder.forward(self.ids([tokens]), self.ids([positions]), attend)
            return self.decoder.logits(hidden[0, self.ids(last_rows)])

    def decode(self, req_indices: tuple[int, ...], lengths: tuple[int, ...], token_ids: Sequence[int]) -> Decoded:
        """One new token of each request index; `lengths` count it."""
        batch = self._batch(req_indices, lengths)
        with self.watch.measure(Part.MODEL):
            attend = DecodeAttend(
                self.store,
                self.state,
                batch,
                self.kernel,
                self.watch,
                chosen=self._chosen(batch),
                keeps_mass=self.policy.uses_mass,
            )
            positions = batch.length_counts.to(torch.int64)[:, None] - 1
            hidden = self.decoder.forward(self.ids(list(token_ids))[:, None], positions, attend)
            if self._looks_ahead:
                self._look_ahead(batch)
            return Decoded(self.decoder.logits(hidden[:, 0]), attend.tokens_attended)

    def _batch(self, req_indices: tuple[int, ...], lengths: tuple[int, ...]) -> StepBatch:
        return StepBatch(req_indices, lengths, self.ids(list(req_indices)), self.ids(list(lengths)).to(torch.int32))

    def _chosen(self, batch: StepBatch) -> tuple[Selection, ...] | None:
        """The selections made ahead, if they are for just this step; else the state is told that it begins."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead.req_indices, ahead.lengths) == (batch.req_indices, batch.lengths):
            return ahead.selections
        with self.watch.measure(Part.SELECTION):
            self.state.begin(batch)
        return None

    def _look_ahead(self, batch: StepBatch) -> None:
        """Choose for the next step of the same sequences. If it turns out another, choosing again gives the same."""
        longer = {
            req_idx: n + 1
            for req_idx, n in zip(batch.req_indices, batch.lengths, strict=True)
            if n < self.store.max_length
        }
        if not longer:
            return
        following = self._batch(tuple(longer), tuple(longer.values()))
        no_query = torch.empty(0)
        with self.watch.measure(Part.SELECTION):
            self.state.begin(following)
            layers = range(self.decoder.spec.num_layers)
            selections = tuple(self.state.select(layer, no_query) for layer in layers)
        with self.watch.measure(Part.TRANSFER):
            for layer, selection in enumerate(selections):
                self.store.prefetch(layer, following.req_indices, selection)
        self._ahead = _Ahead(following.req_indices, following.lengths, selections)

    def ids(self, values: list[int] | list[list[int]]) -> Tensor:
        """Int64 tensor on the decoder's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)

    def _seed_from(self, piece: PromptPiece) -> int | None:
        """First position of the piece whose attention row the policy wants; None when it wants none of them."""
        first = max(piece.segment.start, piece.prompt_len - self.policy.observation_window(piece.prompt_len))
        return first if first < piece.segment.end else None
