"""Tokens in, logits out: one step of the decoder over cached sequences, with the policy deciding what is read.

The engine and the teacher-forced scorer drive the same call, so what is measured is what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.attention.session import KVSession, StepTraffic
from alisa.attention.timing import StepSection, StepTimer
from alisa.model.decoder import Decoder
from alisa.scheduler.plan import StepPlan


class StepResult(NamedTuple):
    """What a step gave."""

    logits: Tensor
    """Float32[N, V], for the last tokens of every chunk that were asked for, in the order of the chunks."""
    traffic: StepTraffic
    kept: dict[int, Tensor]
    """Hidden states `[N, E]` of all tokens of the chunks that were asked for, by the number of the chunk."""


class ModelRunner:
    """A decoder and the session that is its memory.

    Args:
        decoder: the model.
        session: cache, policy and kernels.
        timer: the session's.
    """

    def __init__(self, decoder: Decoder, session: KVSession, timer: StepTimer) -> None:
        self.decoder = decoder
        self.session = session
        self.timer = timer
        self._rotates_by_length = decoder.spec.rotates_by_length
        self._run = timer.timed(StepSection.MODEL, self._step)

    def run(
        self,
        plan: StepPlan,
        tokens: Sequence[Sequence[int]],
        wanted: Sequence[int],
        kept: Sequence[int] = (),
    ) -> StepResult:
        """One step.

        Args:
            plan: what is done and moved.
            tokens: ids of every chunk of the plan.
            wanted: for every chunk, of how many of its last tokens logits are wanted.
            kept: numbers of the chunks of whose tokens the hidden states are wanted; only of prompts.

        Raises:
            CapacityError: the plan does not fit the cache.
        """
        return self._run(plan, tokens, wanted, kept)

    def _step(
        self, plan: StepPlan, tokens: Sequence[Sequence[int]], wanted: Sequence[int], kept: Sequence[int]
    ) -> StepResult:
        if plan.restored:
            assert not any(wanted), "the last token of a prompt is computed"
            assert not kept, "a prompt that is scored is computed"
            return StepResult(torch.empty(0, self.decoder.spec.vocab_size), self.session.restore(plan), {})
        self.session.begin(plan)
        ids = self._ids([token for chunk in tokens for token in chunk])
        positions = self._ids([position for chunk in plan.chunks for position in range(chunk.start, chunk.end)])
        # A prompt is one batch of many tokens, a decode step a batch of as many sequences as it has tokens.
        along, packed = (0, 0) if plan.prefill else (1, (slice(None), 0))
        hidden = self._forward(plan, ids.unsqueeze(along), positions.unsqueeze(along))[packed]
        traffic = self.session.end()
        ends = list(accumulate(chunk.count for chunk in plan.chunks))
        rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
        logits = self.decoder.logits(hidden if len(rows) == len(hidden) else hidden[self._ids(rows)])
        pieces = {n: hidden[ends[n] - plan.chunks[n].count : ends[n]] for n in kept}
        return StepResult(logits, traffic, pieces)

    def _forward(self, plan: StepPlan, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states `[B, T, E]` of ids and positions Int64[B, T], the tokens of the plan in order."""
        lengths = None
        if self._rotates_by_length:
            most = self.session.max_lengths
            lengths = self._ids([most[c.req_idx] for c in plan.chunks for _ in range(c.count)]).view_as(ids)
        return self.decoder.forward(ids, positions, self.session.attend, lengths, self.session.attend_all)

    def _ids(self, values: Sequence[int]) -> Tensor:
        """Int64 tensor on the decoder's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.decoder.device)
