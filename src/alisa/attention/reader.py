"""Who says what a decode step reads, and what is made of it: the policy that was asked for, or dense attention."""

from __future__ import annotations

from torch import Tensor

from alisa.attention.timing import StepSection, StepTimer
from alisa.kernels.base import Attended, Selection, StepBatch
from alisa.policy.base import PolicyState, SelectionPolicy


class StepReader:
    """A policy's calls of a decode step, timed; what a policy leaves at its default, which does nothing, is not called.

    Args:
        policy: chooses.
        state: the policy's.
        timer: told where the time goes.
    """

    def __init__(self, policy: SelectionPolicy, state: PolicyState, timer: StepTimer) -> None:
        self.begin = timer.timed(StepSection.SELECTION, state.begin)
        """`PolicyState.begin`."""
        self.select = timer.timed(StepSection.SELECTION, state.select)
        """`PolicyState.select`."""
        self.fixed_selection = state.fixed_selection
        """`PolicyState.fixed_selection`."""
        self._state = state
        self._uses_mass = policy.uses_mass
        self._combines = type(state).combine is not PolicyState.combine
        self._on_attended = timer.timed(StepSection.SELECTION, state.on_attended)
        self._combine = timer.timed(StepSection.SELECTION, state.combine)

    def output(self, layer: int, selection: Selection, attended: Attended) -> Tensor:
        """The layer's output `[B, H, D]`; the policy has seen the mass, if it looks at it."""
        if self._uses_mass:
            self._on_attended(layer, selection, attended.mass)
        return self._combine(layer, attended) if self._combines else attended.out

    def log_sum_exp(self, layer: int, attended: Attended) -> Tensor:
        """Float32[B, H] of an output that stands for all tokens, of which some were read.

        The policy knows which part of the weight was: the scores of all add up to more by that.
        """
        shares = self._state.weight_read(layer)
        return attended.log_sum_exp if shares is None else attended.log_sum_exp - shares.log()


def in_chunks(numbers: tuple[int, ...], batch: StepBatch) -> tuple[int, ...]:
    """Numbers of tokens, added up for each sequence of a step."""
    sums = dict.fromkeys(batch.req_indices, 0)
    for req_idx, number in zip(batch.req_indices, numbers, strict=True):
        sums[req_idx] += number
    return tuple(sums.values())
