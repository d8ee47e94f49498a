"""Query-aware selection: rank all tokens against the current query by a low-bit sketch of their keys.

The sketch of every token stays on the device; it is small against the row it stands for (for a head of 64 values in 16
bits 36 of 256 bytes for the key in 4 bits, and 20 for the value in 2); a head of more than 128 values has a range for
each 64 of them. Each step computes approximate attention weights
w of all tokens from it, sums them over the heads of an index set and reads the winners in full. A token can return at
any time, which the history-based policies cannot offer. Ranking by cheap keys: SparQ (arXiv 2312.04985), InfiniGen
(2406.19707), Quest (2406.10774).

The same weights say how much of a head's attention the winners hold, its share. What the other tokens would have added
comes from the sketch of their values v^:

    out = share * out(read) + sum of w_j * v^_j over the tokens j that are not read

Attention that is spread thinly over many tokens is held by no choice of a few; but where many small terms are added,
the errors of two bits cancel. `sketch-mean` puts the mean of all values in place of the sum (SparQ):

    out = share * out(read) + (1 - share) * mean(V)

`sketch-plain` goes without either. `oracle` is `sketch-mean` with exact keys, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alisa.kernels.base import Attended, Chosen, Ranking, Selection, SelectionKernels, Sketch, StepBatch
from alisa.kernels.reference.sketch import attention_weights, token_ids, weight_read
from alisa.policy.base import PolicyState, SelectionPolicy, SketchedStep
from alisa.policy.ranked import RankedStep
from alisa.policy.state_bytes import VALUE_BITS, KeyBits, key_bits, num_parts
from alisa.policy.token_state import TokenState
from alisa.spec import AttentionShape

Completion = Literal["values", "mean", "none"]
"""What stands in for the tokens that are not read: a sketch of their values, the mean of all values, or nothing."""


@dataclass(frozen=True)
class KeySketch(SelectionPolicy):
    """k recent tokens, and the k older ones with the largest approximate attention weight for the current query."""

    bits: KeyBits | None = "auto"
    """Bits per key value; None keeps the exact keys (the oracle)."""
    per_head: bool = False
    """One index set for each KV head instead of one for the layer."""
    completion: Completion = "values"
    """Exact keys have none of the values."""

    @property
    def query_aware(self) -> bool:
        """The query decides."""
        return True

    @property
    def can_truncate(self) -> bool:
        """A sketch is of one token, and is written anew with the next one in its place; a mean is of all."""
        return self.completion != "mean"

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
        """A state of `bits / 8` bytes per key value and 4 per key or part of it, and what the completion takes.

        That is the same for each value with 2 bits, or 8 bytes for each value of the mean of a sequence.
        """
        if self.bits is None:
            assert self.completion != "values", "a sketch of the values goes with one of the keys"
            state = ExactKeys
        else:
            state = SketchedRows if self.completion == "values" else SketchedKeys
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
        of_layers = [policy.budget.of_layer(layer) for layer in range(shape.num_layers)]
        # A step is laid out once for each budget, not for each layer.
        self._budgets = list(dict.fromkeys(of_layers))
        self._budget_of_layer = [self._budgets.index(budget) for budget in of_layers]
        self._kernels = kernels
        self._num_sets = policy.num_sets(shape)
        self._completes = policy.completion != "none"
        self._softcap = shape.softcap
        self._value_sums: Tensor | None = None
        if policy.completion == "mean":
            sums = (shape.num_layers, max_num_seqs, shape.num_kv_heads, shape.head_dim)
            self._value_sums = torch.zeros(sums, dtype=torch.float64, device=device)
            self._sequence_bytes = self._value_sums.nbytes // max_num_seqs
        self._steps: list[RankedStep] = []
        self._rankings: list[Ranking] = []
        self._req_index = self._shares = torch.empty(0)

    def open(self, req_idx: int, expected_tokens: int) -> None:
        """Values are summed anew; a key is written before it is read."""
        super().open(req_idx, expected_tokens)
        if self._value_sums is not None:
            self._value_sums[:, req_idx].zero_()

    def fork(self, source: int, req_idx: int) -> None:
        """The sum of the values too."""
        super().fork(source, req_idx)
        if self._value_sums is not None:
            self._value_sums[:, req_idx] = self._value_sums[:, source]

    def on_append(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the new keys, and add the values."""
        self._keep(layer, self._token_ids(req_index, positions), keys, values)
        if self._value_sums is not None:
            self._kernels.mean_add(self._value_sums[layer], req_index, values)

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._steps = [RankedStep.plan(batch, budget, self._num_sets) for budget in self._budgets]
        self._req_index = batch.req_index
        super().begin(batch)

    def select(self, layer: int, query: Tensor) -> Selection:
        """Weights of every token for this query, and the best of them."""
        number = self._budget_of_layer[layer]
        step = self._steps[number]
        # The new token's own weight counts in the softmax, though it is read in any case.
        chosen = self._choose(layer, query, self._rankings[number])
        self._shares = chosen.shares
        return step.selection(chosen.positions, None if step.coverages is None else chosen.counts)

    def weight_read(self, layer: int) -> Tensor | None:
        """As the sketch has it."""
        return self._shares if self._completes else None

    def combine(self, layer: int, attended: Attended) -> Tensor:
        """The mean of all values takes the weight that the layer's last selection left out."""
        if self._value_sums is None:
            return attended.out
        sums = self._value_sums[layer]
        lengths = self._rankings[0].lengths
        return self._kernels.mean_blend(sums, self._req_index, lengths, attended.out, self._shares)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        """What is kept of keys and values `[N, G, D]` is at entries `ids` Int64[N]."""
        raise NotImplementedError

    def _choose(self, layer: int, query: Tensor, ranking: Ranking) -> Chosen:
        """What to read."""
        raise NotImplementedError

    def _locate(self, batch: StepBatch, starts: Tensor) -> None:
        self._rankings = [
            step.ranking(starts, batch.length_counts)._replace(softcap=self._softcap) for step in self._steps
        ]


class SketchedKeys(KeyState):
    """A sketch of the keys of every layer, `[T, G, ...]`; see `alisa.kernels.reference.sketch`."""

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
        self._key_sketches = self._new_sketches(shape, key_bits(policy.bits, shape.head_dim))

    def _new_sketches(self, shape: AttentionShape, bits: int) -> list[Sketch]:
        """One for each layer."""
        parts = num_parts(shape.head_dim)
        num_heads, code_bytes = shape.num_kv_heads * parts, -(-shape.head_dim // parts * bits // 8)
        codes = self._new_table((shape.num_layers,), (num_heads, code_bytes), torch.uint8)
        ranges = self._new_table((shape.num_layers,), (num_heads, 2), torch.float16)
        return [Sketch(*tables, bits, parts) for tables in zip(codes.unbind(), ranges.unbind(), strict=True)]

    def _keep(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        self._kernels.sketch_append(self._key_sketches[layer], ids, keys)

    def _choose(self, layer: int, query: Tensor, ranking: Ranking) -> Chosen:
        return self._kernels.sketch_select(query, self._key_sketches[layer], ranking)


class SketchedRows(SketchedKeys):
    """A sketch of the values as well."""

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
        self._value_sketches = self._new_sketches(shape, VALUE_BITS)
        self._rest = torch.empty(0)

    def _keep(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        self._kernels.sketch_append(self._key_sketches[layer], ids, keys)
        self._kernels.sketch_append(self._value_sketches[layer], ids, values)

    def sketched(self, req_index: Tensor, positions: Tensor) -> SketchedStep:
        """All of it."""
        ids = self._token_ids(req_index, positions)
        keys, values = self._key_sketches, self._value_sketches
        return SketchedStep(keys, values, ids, self._steps, self._rankings, self._budget_of_layer)

    def on_chosen(self, layer: int, shares: Tensor) -> None:
        """What `weight_read` tells."""
        self._shares = shares

    def combine(self, layer: int, attended: Attended) -> Tensor:
        """The sketch says what the tokens that the layer's last selection left out would have added."""
        return self._kernels.rest_blend(attended.out, self._shares, self._rest)

    def _choose(self, layer: int, query: Tensor, ranking: Ranking) -> Chosen:
        keys, values = self._key_sketches[layer], self._value_sketches[layer]
        chosen, self._rest = self._kernels.sketch_complete(query, keys, values, ranking)
        return chosen


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

    def _keep(self, layer: int, ids: Tensor, keys: Tensor, values: Tensor) -> None:
        self._keys[layer].index_copy_(0, ids, keys.float())

    def _choose(self, layer: int, query: Tensor, ranking: Ranking) -> Chosen:
        """The best by true weight."""
        starts, lengths, older_ends, older_counts, counts, num_slots, width, num_sets, softcap, _ = ranking
        keys = self._keys[layer].index_select(0, token_ids(starts, lengths, width))
        weights = attention_weights(query, keys, lengths, self._scale, softcap)
        scores = weights.unflatten(1, (num_sets, -1)).sum(dim=2)
        rows = torch.arange(len(counts), device=query.device) * width
        positions = self._kernels.select(scores.view(-1), rows, older_ends, older_counts, counts, num_slots, width)
        return Chosen(positions, weight_read(weights, positions, counts, lengths), counts)
