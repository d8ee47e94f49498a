"""What a selection policy is: frozen parameters, and a state that holds all that changes.

A policy sees lengths and attention mass, never slots; keys and values only as they are appended. For each layer of each
decode step it says which positions are read, and may account for the others afterwards (`combine`). Once a step it is
told who is in the batch (`begin`), so that the work which does not depend on the layer is done once.

Both classes have defaults, so that a policy says only what is special about it. The order of the calls:

    open(req_idx)                                        a sequence takes this request index
    reserve(req_idx, num_tokens)                         before its tokens are appended, in every step that adds some
    on_append(layer, ...), observe_prompt(layer, ...)    in each layer, while the prompt is read
    begin(batch)                                         once for each decode step, then in each layer
    on_append(layer, ...), select(layer, query), on_attended(layer, ...), combine(layer, ...)
    close(req_idx)

`fork(source, req_idx)` may take the place of the second line: the sequence has become a copy of another one. Where
`can_truncate` is true, tokens may come again at positions that were there: the former ones are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from alisa.budget import Budget
from alisa.kernels.base import Attended, Ranking, Selection, SelectionKernels, Sketch, StepBatch
from alisa.policy.ranked import RankedStep
from alisa.spec import AttentionShape


class SketchedStep(NamedTuple):
    """What a policy keeps of all tokens, and how a decode step chooses by it."""

    keys: Sequence[Sketch]
    """Of each layer."""
    values: Sequence[Sketch]
    """Of each layer."""
    ids: Tensor
    """Int64[B], rows of the sketches: where the new tokens go."""
    steps: Sequence[RankedStep]
    """One for each budget."""
    rankings: Sequence[Ranking]
    """Theirs."""
    step_of_layer: Sequence[int]
    """Which of them each layer has."""


class PolicyState:
    """Everything that changes while a policy runs; made by `SelectionPolicy.start`. By default it keeps nothing."""

    @property
    def nbytes(self) -> int:
        """Memory of the state of the open sequences, what the registry's `state_bytes` predicts."""
        return 0

    def open(self, req_idx: int, expected_tokens: int) -> None:
        """A new sequence without tokens takes this request index; nothing of its former owner remains.

        It may come to `expected_tokens` tokens, for which no room is taken yet.
        """

    def reserve(self, req_idx: int, num_tokens: int) -> None:
        """There is room for `num_tokens` tokens of this open sequence; what the state knows may have moved.

        The caller keeps the sum of `alisa.budget.state_tokens` over all open sequences within the `num_tokens` of
        `start`.
        """

    def fork(self, source: int, req_idx: int) -> None:
        """The state of this sequence, reserved for as many tokens, is that of the sequence `source`."""

    def close(self, req_idx: int) -> None:
        """The sequence is gone, and its room is free."""

    def observe_prompt(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Take in rows of the observation window: mass Float32[rows, J, N] of queries at first, first + 1, ...

        The columns are positions start, start + 1, ...; a row may come in several pieces.
        """

    def on_append(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """New tokens at (req_index, positions), Int64[N] each, have these keys and values `[N, G, D]`; before `select`.

        Every layer of a step gets the same two index tensors.
        """

    def begin(self, batch: StepBatch) -> None:
        """A decode step of these sequences starts; their new tokens are the last of their lengths.

        A step may begin twice, and the one that begins next may be another one: nothing is counted here.
        """

    def select(self, layer: int, query: Tensor) -> Selection:
        """Positions that this layer reads, the new token's own among them.

        The query `[B, H, D]` is for policies that are `query_aware`.
        """
        raise NotImplementedError

    def fixed_selection(self) -> Selection | None:
        """What every layer of the step that has begun reads; None: not the same, or not known before the layer runs."""
        return None

    def on_attended(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """Take in what the attention over `selection` gave: mass Float32[B, J, K], 0 on padding."""

    def weight_read(self, layer: int) -> Tensor | None:
        """The part Float32[B, H] of each head's weight that lies on what the layer's last selection reads.

        None: `combine` does not reckon with other tokens.
        """
        return None

    def sketched(self, req_index: Tensor, positions: Tensor) -> SketchedStep | None:
        """The running step, as a kernel needs it that does `on_append`, `select` and `combine` in one call.

        New tokens are at (req_index, positions), as in `on_append`. None: there is no such kernel for this policy.
        """
        return None

    def on_chosen(self, layer: int, shares: Tensor) -> None:
        """That kernel has run: shares Float32[B, H] are what `weight_read` tells."""

    def combine(self, layer: int, attended: Attended) -> Tensor:
        """The layer's output `[B, H, D]`: that of the attention, or what it is with the tokens not read in mind."""
        return attended.out


@dataclass(frozen=True)
class SelectionPolicy:
    """Frozen parameters of a way to choose tokens.

    What the planner has to know without torch is in `alisa.policy.registry`; a test compares the two.
    """

    budget: Budget

    @property
    def query_aware(self) -> bool:
        """Whether the query decides. If not, history does, and the next step's rows are known a step early."""
        return False

    @property
    def uses_mass(self) -> bool:
        """Whether `on_attended` uses the mass; where it does not, nobody has to compute it."""
        return False

    @property
    def can_truncate(self) -> bool:
        """Whether the last tokens of a sequence can be taken back, so that others come in their place.

        Then several tokens can go through one step, too: what is kept of one does not depend on those before it.
        """
        return False

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """(recent, older): of n earlier tokens, the recent ones that every layer reads, and how many of the others."""
        return self.budget.split(num_earlier)

    def of_layer(self, layer: int) -> Self:
        """The policy for a state of this one layer alone."""
        return replace(self, budget=self.budget.of_layer(layer))

    def num_sets(self, shape: AttentionShape) -> int:
        """J: 1 for one index set per layer, G for one per KV head."""
        return 1

    def observation_window(self, prompt_len: int) -> int:
        """How many of the last rows of a prompt `observe_prompt` wants; 0 for none."""
        return 0

    def start(
        self,
        shape: AttentionShape,
        *,
        max_num_seqs: int,
        num_tokens: int,
        max_len: int,
        device: torch.device,
        kernels: SelectionKernels,
    ) -> PolicyState:
        """A fresh state.

        Args:
            shape: of the model's attention.
            max_num_seqs: request indices are below it.
            num_tokens: room for the tokens of all sequences together, each rounded up to whole blocks
                (`alisa.budget.state_tokens`). Memory is taken as it is used, not here.
            max_len: the longest that one sequence may become.
            device: where the indices, keys and masses lie.
            kernels: what the state's hot loops run on.
        """
        raise NotImplementedError
