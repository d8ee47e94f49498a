"""Query-aware selection: rank all tokens against the current query by a low-bit sketch of their keys.

The sketch of every token stays on the device; it is small against the row it stands for (4 bits: 36 of 256 bytes for
a head of 64 values in 16 bits). Each step computes approximate attention weights of all tokens from it, sums them over
the heads of an index set and reads the winners in full. A token can return at any time, which the history-based
policies cannot offer. Ranking by cheap keys: SparQ (arXiv 2312.04985), InfiniGen (2406.19707), Quest (2406.10774).

The same weights say how much of a head's attention the winners hold; the mean of all values stands in for the rest:

    out = share * out(read) + (1 - share) * mean(V)

Attention that is spread thinly over many tokens is close to their mean, and no choice of a few holds it. The correction
is that of SparQ. `sketch-plain` goes without it. `oracle` is `sketch` with exact keys, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.kernels.reference.sketch import attention_weights, token_ids, weight_read
from alisa.policy.base import PolicyState, SelectionPolicy
from alisa.policy.ranked import RankedStep
from alisa.policy.token_state import TokenState
from alisa.spec import AttentionShape

SketchBits = Literal[2, 4, 8]


@dataclass(frozen=True)
class KeySketch(SelectionPolicy):
    """k recent tokens, and the k older ones with the largest approximate attention weight for the current query."""

    bits: SketchBits | None = 4
    """Bits per key value; None keeps the exact keys (the oracle)."""
    per_head: bool = False
    """One index set for each KV head instead of one for the layer."""
    uses_mean: bool = True
    """Whether the mean of all values stands in for the tokens that are not read."""

    @property
    def query_aware(self) -> bool:
        """The query decides."""
        return True

    def num_sets(self, shape: AttentionShape) -> int:
        """Weights are summed over all heads, or over those of a KV head."""
        return shape.num_kv_heads if self.per_head else 1

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
        """A state of `bits / 8` bytes per key value and 4 bytes per key, and 8 for each value of the mean."""
        state = ExactKeys if self.bits is None else SketchedKeys
        return state(self, shape, kernels, max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)


class KeyState(TokenState):
    """A key in some form for every token, and the sum of the values of every sequence, Float64[L, max_num_seqs, G, D].

    The sum is in double precision, so that neither the length of a text nor how its tokens came in shows in the mean.
    """

    def __init__(
        self,
        policy: KeySketch,
        shape: AttentionShape,
        kernels: SelectionKernels,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        self._budget = policy.budget
        self._kernels = kernels
        self._num_sets = policy.num_sets(shape)
        self._value_sums: Tensor | None = None
        if policy.uses_mean:
            sums = (shape.num_layers, max_num_seqs, shape.num_kv_heads, shape.head_dim)
            self._value_sums = torch.zeros(sums, dtype=torch.float64, device=device)
            self._sequence_bytes = self._value_sums.nbytes // max_num_seqs
        self._step: RankedStep | None = None
        self._req_index = self._starts = self._lengths = self._shares = torch.empty(0)

    def open(self, req_idx: int) -> None:
        """Values are summed anew; a key is written before it is read."""
        super().open(req_idx)
        if self._value_sums is not None:
            self._value_sums[:, req_idx].zero_()

    def on_append(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the new keys, and add the values."""
        self._keep(layer, self._token_ids(req_index, positions), keys)
        if self._value_sums is not None:
            self._kernels.mean_add(self._value_sums[layer], req_index, values)

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._step = RankedStep.plan(batch, self._budget, self._num_sets)
        self._req_index, self._lengths = batch.req_index, batch.length_counts
        super().begin(batch)

    def select(self, layer: int, query: Tensor) -> Selection:
        """Weights of every token for this query, and the best of them."""
        step = self._step
        assert step is not None, "select comes after begin"
        # The new token's own weight counts in the softmax, though it is read in any case.
        positions, self._shares = self._choose(layer, query, step)
        return step.selection(positions)

    def combine(self, layer: int, attended: Attended) -> Tensor:
        """The mean of all values takes the weight that the layer's last selection left out."""
        if self._value_sums is None:
            return attended.out
        sums = self._value_sums[layer]
        return self._kernels.mean_blend(sums, self._req_index, self._lengths, attended.out, self._shares)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor) -> None:
        """Keys `[N, G, D]` are kept at entries `ids` Int64[N]."""
        raise NotImplementedError

    def _choose(self, layer: int, query: Tensor, step: RankedStep) -> tuple[Tensor, Tensor]:
        """Positions Int32[B * J, K] to read, and the part of each head's weight that lies on them, Float32[B, H]."""
        raise NotImplementedError

    def _locate(self, batch: StepBatch, starts: Tensor) -> None:
        self._starts = starts


class SketchedKeys(KeyState):
    """Codes UInt8[L, T, G, P] and ranges Float16[L, T, G, 2]; see `alisa.kernels.reference.sketch`."""

    def __init__(
        self,
        policy: KeySketch,
        shape: AttentionShape,
        kernels: SelectionKernels,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(policy, shape, kernels, max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        assert policy.bits is not None, "without bits there are exact keys"
        self._bits = policy.bits
        code_bytes = -(-shape.head_dim * self._bits // 8)
        self._codes = self._new_table((shape.num_layers,), (shape.num_kv_heads, code_bytes), torch.uint8)
        self._ranges = self._new_table((shape.num_layers,), (shape.num_kv_heads, 2), torch.float16)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor) -> None:
        self._kernels.sketch_append(self._codes[layer], self._ranges[layer], ids, keys, self._bits)

    def _choose(self, layer: int, query: Tensor, step: RankedStep) -> tuple[Tensor, Tensor]:
        return self._kernels.sketch_select(
            query,
            self._codes[layer],
            self._ranges[layer],
            self._bits,
            self._starts,
            self._lengths,
            step.older_ends,
            step.older_counts,
            step.row_counts,
            step.num_slots,
            step.width,
            step.num_sets,
        )


class ExactKeys(KeyState):
    """The keys themselves, Float32[L, T, G, D]."""

    def __init__(
        self,
        policy: KeySketch,
        shape: AttentionShape,
        kernels: SelectionKernels,
        *,
        max_num_seqs: int,
        num_tokens: int,
        device: torch.device,
    ) -> None:
        super().__init__(policy, shape, kernels, max_num_seqs=max_num_seqs, num_tokens=num_tokens, device=device)
        self._scale = shape.scale
        self._keys = self._new_table((shape.num_layers,), (shape.num_kv_heads, shape.head_dim), torch.float32)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor) -> None:
        self._keys[layer].index_copy_(0, ids, keys.float())

    def _choose(self, layer: int, query: Tensor, step: RankedStep) -> tuple[Tensor, Tensor]:
        """The best by true weight."""
        keys = self._keys[layer].index_select(0, token_ids(self._starts, self._lengths, step.width))
        weights = attention_weights(query, keys, self._lengths, self._scale)
        scores = weights.unflatten(1, (step.num_sets, -1)).sum(dim=2)
        rows = torch.arange(step.num_seqs * step.num_sets, device=query.device) * step.width
        positions = self._kernels.select(
            scores.view(-1), rows, step.older_ends, step.older_counts, step.row_counts, step.num_slots, step.width
        )
        return positions, weight_read(weights, positions, step.row_counts, self._lengths)
