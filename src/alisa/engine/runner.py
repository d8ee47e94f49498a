"""Tokens in, logits out: one pass of the decoder over cached sequences, with the policy deciding what is read.

The engine and the teacher-forced scorer drive the same two calls, so what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.decode import DecodeKernel
from alisa.engine.attend import DecodeAttend, PrefillAttend, PrefillSegment
from alisa.engine.recorder import Part, Stopwatch
from alisa.kv.store import KVStore
from alisa.model.decoder import Decoder
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.types import Segment, StepBatch


class PromptPiece(NamedTuple):
    """Consecutive tokens of one prompt."""

    segment: Segment
    token_ids: Sequence[int]
    prompt_len: int


class Decoded(NamedTuple):
    """Logits Float32[B, V] of one decode step, and the cached tokens each sequence read, summed over layers."""

    logits: Tensor
    tokens_attended: list[int]


class Runner:
    """A decoder, a store, and a policy with its state, wired together by `attend`."""

    def __init__(
        self,
        decoder: Decoder,
        policy: SelectionPolicy,
        store: KVStore,
        state: PolicyState,
        kernel: DecodeKernel,
        watch: Stopwatch,
    ) -> None:
        self.decoder = decoder
        self.policy = policy
        self.store = store
        self.state = state
        self.kernel = kernel
        self.watch = watch

    def prefill(self, pieces: Sequence[PromptPiece]) -> Tensor:
        """Read pieces of prompts, packed; logits Float32[N, V] of the N prompts that are complete now, in order."""
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
                self.policy.num_sets(self.decoder.spec),
                tuple(PrefillSegment(piece.segment, self._seed_from(piece)) for piece in pieces),
                self.watch,
            )
            hidden = self.decoder.forward(self.ids([tokens]), self.ids([positions]), attend)
            return self.decoder.logits(hidden[0, self.ids(last_rows)])

    def decode(self, lanes: tuple[int, ...], lengths: tuple[int, ...], token_ids: Sequence[int]) -> Decoded:
        """One new token of each lane; `lengths` count it."""
        length_ids = self.ids(list(lengths))
        batch = StepBatch(lanes, lengths, self.ids(list(lanes)), length_ids.to(torch.int32))
        with self.watch.measure(Part.MODEL):
            attend = DecodeAttend(self.store, self.state, batch, self.kernel, self.watch)
            hidden = self.decoder.forward(self.ids(list(token_ids))[:, None], length_ids[:, None] - 1, attend)
            return Decoded(self.decoder.logits(hidden[:, 0]), attend.tokens_attended)

    def ids(self, values: list[int] | list[list[int]]) -> Tensor:
        """Int64 tensor on the decoder's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)

    def _seed_from(self, piece: PromptPiece) -> int | None:
        """First position of the piece whose attention row the policy wants; None when it wants none of them."""
        first = max(piece.segment.start, piece.prompt_len - self.policy.seed_rows(piece.prompt_len))
        return first if first < piece.segment.end else None
