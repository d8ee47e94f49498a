"""Query-aware selection: rank all tokens against the current query by a low-bit sketch of their keys.

The sketch of every token stays on the device; it is small against the row it stands for (4 bits: 36 of 256 bytes for
a head of 64 values in 16 bits). Each step computes approximate attention weights of all tokens from it, sums them over
the heads of an index set and reads the winners in full. A token can return at any time, which the history-based
policies cannot offer. Ranking by cheap keys: SparQ (arXiv 2312.04985), InfiniGen (2406.19707), Quest (2406.10774).

The same weights say how much of a head's attention the winners hold; the rest is put down to the mean of all values
(`mean_value.py`). `sketch-plain` goes without that. `oracle` is `sketch` with exact keys, for comparison only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from alisa.budget import Budget
from alisa.kernels.base import Attended, Selection, SelectionKernels, StepBatch
from alisa.policy.mean_value import MeanValues
from alisa.policy.ranked import RankedStep
from alisa.spec import ModelSpec

SketchBits = Literal[2, 4, 8]

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class KeySketch:
    """k recent tokens, and the k older ones with the largest approximate attention weight for the current query."""

    budget: Budget
    bits: SketchBits | None = 4
    """Bits per key value; None keeps the exact keys (the oracle)."""
    per_head: bool = False
    """One index set for each KV head instead of one for the layer."""
    completes: bool = True
    """Whether the mean of all values stands in for the tokens that are not read."""
    timing: Literal["ahead", "in_layer"] = "in_layer"

    @property
    def name(self) -> str:
        """`oracle`, or `sketch` with what is not usual about it."""
        if self.bits is None:
            return "oracle"
        bits = "" if self.bits == 4 else f"-{self.bits}bit"
        return "sketch" + bits + ("-head" if self.per_head else "") + ("" if self.completes else "-plain")

    @property
    def keeps_mass(self) -> bool:
        """The query decides."""
        return False

    def reads(self, num_earlier: int) -> tuple[int, int]:
        """The budget."""
        return self.budget.split(num_earlier)

    def num_sets(self, spec: ModelSpec) -> int:
        """Weights are summed over all heads, or over those of a KV head."""
        return spec.num_kv_heads if self.per_head else 1

    def seed_rows(self, prompt_len: int) -> int:
        """No history needed."""
        return 0

    def start(
        self,
        spec: ModelSpec,
        max_num_seqs: int,
        capacity: int,
        device: torch.device,
        kernels: SelectionKernels | None = None,
    ) -> KeySketchState:
        """A state of `bits / 8` bytes per key value and 4 bytes per key, and 8 for each value of the mean."""
        keys: KeyTable
        if self.bits is None:
            keys = ExactKeys(spec, max_num_seqs * capacity, device)
        else:
            keys = SketchedKeys(spec, max_num_seqs * capacity, self.bits, device, kernels)
        means = MeanValues(spec, max_num_seqs, device, kernels) if self.completes else None
        return KeySketchState(self.budget, self.num_sets(spec), keys, means, capacity, kernels)


class Choice(NamedTuple):
    """What one layer reads, and how much of its attention that is."""

    selection: Selection
    shares: Tensor
    """Float32[B, H]: the part of each head's approximate weight that lies on the selection."""


class ExactKeys:
    """The keys themselves, Float32[L, T, G, D]."""

    def __init__(self, spec: ModelSpec, num_tokens: int, device: torch.device) -> None:
        self._keys = torch.empty(spec.num_layers, num_tokens, spec.num_kv_heads, spec.head_dim, device=device)

    @property
    def nbytes(self) -> int:
        """Memory of the keys."""
        return self._keys.nbytes

    def append(self, layer: int, ids: Tensor, keys: Tensor) -> None:
        """Keys `[N, G, D]` stand at rows `ids`."""
        self._keys[layer].index_copy_(0, ids, keys.float())

    def choose(self, layer: int, query: Tensor, starts: Tensor, lengths: Tensor, step: RankedStep) -> Choice:
        """The best by true weight; starts and lengths as in `SelectionKernels.sketch_select`."""
        keys = self._keys[layer].index_select(0, token_ids(starts, lengths, step.width + 1))
        return choose(attention_weights(query, keys, lengths), lengths, step)


class SketchedKeys:
    """Codes UInt8[L, T, G, P] and ranges Float16[L, T, G, 2]; see `sketch` for what they mean."""

    def __init__(
        self,
        spec: ModelSpec,
        num_tokens: int,
        bits: SketchBits,
        device: torch.device,
        kernels: SelectionKernels | None,
    ) -> None:
        keys = (spec.num_layers, num_tokens, spec.num_kv_heads)
        self._bits: SketchBits = bits
        self._codes = torch.empty(*keys, -(-spec.head_dim * bits // 8), dtype=torch.uint8, device=device)
        self._ranges = torch.empty(*keys, 2, dtype=torch.float16, device=device)
        self._kernels = kernels

    @property
    def nbytes(self) -> int:
        """Codes and their ranges."""
        return self._codes.nbytes + self._ranges.nbytes

    def append(self, layer: int, ids: Tensor, keys: Tensor) -> None:
        """Keys `[N, G, D]` are sketched at rows `ids`."""
        append = sketch_append if self._kernels is None else self._kernels.sketch_append
        append(self._codes[layer], self._ranges[layer], ids, keys, self._bits)

    def choose(self, layer: int, query: Tensor, starts: Tensor, lengths: Tensor, step: RankedStep) -> Choice:
        """The best by approximate weight; starts and lengths as in `SelectionKernels.sketch_select`."""
        codes, ranges = self._codes[layer], self._ranges[layer]
        if self._kernels is None:
            weights = sketch_weights(query, codes, ranges, self._bits, starts, lengths, step.width + 1)
            return choose(weights, lengths, step)
        positions, shares = self._kernels.sketch_select(
            query,
            codes,
            ranges,
            self._bits,
            starts,
            lengths,
            step.older_ends,
            step.older_counts,
            step.row_counts,
            max(step.num_tokens),
            step.width + 1,
            step.num_sets,
        )
        return Choice(step.selection(positions), shares)


KeyTable = ExactKeys | SketchedKeys


class KeySketchState:
    """A key, or its sketch, for every token; position p of a request index is row `req_idx * capacity + p`."""

    def __init__(
        self,
        budget: Budget,
        num_sets: int,
        keys: KeyTable,
        means: MeanValues | None,
        capacity: int,
        kernels: SelectionKernels | None,
    ) -> None:
        self._budget = budget
        self._num_sets = num_sets
        self._keys = keys
        self._means = means
        self._capacity = capacity
        self._kernels = kernels
        self._step: RankedStep | None = None
        self._req_index = self._starts = self._lengths = self._shares = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """The table of keys and the sums of values."""
        return self._keys.nbytes + (self._means.nbytes if self._means is not None else 0)

    def open(self, req_idx: int, num_tokens: int) -> None:
        """Values are summed anew; a key is written before it is read."""
        if self._means is not None:
            self._means.open(req_idx)

    def seed(self, layer: int, req_idx: int, first: int, start: int, mass: Tensor) -> None:
        """Never asked for: `seed_rows` is 0."""

    def remember(self, layer: int, req_index: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep the new keys, and add the values."""
        self._keys.append(layer, torch.add(positions, req_index, alpha=self._capacity), keys)
        if self._means is not None:
            self._means.add(layer, req_index, values)

    def begin(self, batch: StepBatch) -> None:
        """Lay out the step."""
        self._step = RankedStep.plan(batch, self._budget, self._num_sets, self._kernels)
        self._req_index = batch.req_index
        self._starts = batch.req_index * self._capacity
        self._lengths = batch.length_counts

    def select(self, layer: int, query: Tensor) -> Selection:
        """Approximate weights of every token for this query, and the best of them."""
        step = self._step
        assert step is not None, "select comes after begin"
        # The new token's own weight counts in the softmax, though it is read in any case.
        chosen = self._keys.choose(layer, query, self._starts, self._lengths, step)
        self._shares = chosen.shares
        return chosen.selection

    def observe(self, layer: int, selection: Selection, mass: Tensor) -> None:
        """History decides nothing here."""

    def complete(self, layer: int, attended: Attended) -> Tensor:
        """The mean of all values takes the weight that the layer's last selection left out."""
        if self._means is None:
            return attended.out
        return self._means.blend(layer, self._req_index, self._lengths, attended.out, self._shares)


def sketch(keys: Tensor, bits: SketchBits) -> tuple[Tensor, Tensor]:
    """Quantise keys `[N, G, D]` between their own minimum and maximum, per token and head.

    With P = ceil(D * bits / 8), byte i holds the codes i, i + P, i + 2P, ..., lowest bits first, so that a kernel gets
    runs of consecutive codes by shifts alone.

    Returns:
        Codes UInt8[N, G, P] and (step, minimum) Float16[N, G, 2]: key = minimum + step * code, to half a step and what
        float16 rounds.
    """
    values = keys.float()
    low, high = values.aminmax(dim=-1, keepdim=True)
    minimum = (low.clamp(-_FLOAT16_MAX, _FLOAT16_MAX) + 0.0).half()  # + 0: no negative zero
    reach = (high - minimum.float()) / (2**bits - 1)
    step = (reach.clamp(0.0, _FLOAT16_MAX) + 0.0).half()
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    codes = ((values - minimum.float()) * inverse).clamp(0, 2**bits - 1).round().to(torch.uint8)
    num_planes, head_dim = 8 // bits, keys.shape[-1]
    planes = pad(codes, (0, -head_dim % num_planes)).unflatten(-1, (num_planes, -1))
    packed = (planes << _shifts(bits, keys.device)).sum(dim=-2).to(torch.uint8)
    return packed, torch.cat((step, minimum), dim=-1)


def unsketch(codes: Tensor, ranges: Tensor, bits: SketchBits, head_dim: int) -> Tensor:
    """The keys Float32[N, G, D] that the codes stand for."""
    planes = (codes.unsqueeze(-2) >> _shifts(bits, codes.device)) & (2**bits - 1)
    values = planes.flatten(-2)[..., :head_dim]
    return values.float() * ranges[..., :1].float() + ranges[..., 1:].float()


def _shifts(bits: SketchBits, device: torch.device) -> Tensor:
    """Where each plane begins in a byte, UInt8[planes, 1]."""
    return torch.arange(0, 8, bits, device=device, dtype=torch.uint8)[:, None]


def sketch_append(codes: Tensor, ranges: Tensor, ids: Tensor, keys: Tensor, bits: SketchBits) -> None:
    """The reference of `SelectionKernels.sketch_append`."""
    new_codes, new_ranges = sketch(keys, bits)
    codes.index_copy_(0, ids, new_codes)
    ranges.index_copy_(0, ids, new_ranges)


def sketch_scores(
    query: Tensor,
    codes: Tensor,
    ranges: Tensor,
    bits: SketchBits,
    starts: Tensor,
    lengths: Tensor,
    width: int,
    num_sets: int,
) -> Tensor:
    """Approximate weights Float32[B, num_sets, width], summed over the heads of each set: what tokens are ranked by.

    The reference of the native kernels' scores; arguments as in `SelectionKernels.sketch_select`.
    """
    return sketch_weights(query, codes, ranges, bits, starts, lengths, width).unflatten(1, (num_sets, -1)).sum(dim=2)


def sketch_weights(
    query: Tensor, codes: Tensor, ranges: Tensor, bits: SketchBits, starts: Tensor, lengths: Tensor, width: int
) -> Tensor:
    """Approximate weights Float32[B, H, width] of every head, 0 from `lengths[b]` on."""
    ids = token_ids(starts, lengths, width)
    keys = unsketch(codes.index_select(0, ids), ranges.index_select(0, ids), bits, query.shape[-1])
    return attention_weights(query, keys, lengths)


def choose(weights: Tensor, lengths: Tensor, step: RankedStep) -> Choice:
    """The tokens with the largest weight, summed over the heads of each index set, and what they hold of each head's.

    Args:
        weights: Float32[B, H, width].
        lengths: Int32[B].
        step: the budget.
    """
    num_seqs, num_heads, _ = weights.shape
    scores = weights.unflatten(1, (step.num_sets, -1)).sum(dim=2)
    selection = step.select(scores.flatten(0, 1), torch.arange(num_seqs * step.num_sets, device=weights.device))
    positions = selection.positions.to(torch.int64).repeat_interleave(num_heads // step.num_sets, dim=1)
    real = torch.arange(positions.shape[2], device=positions.device) < selection.counts[:, None, None]
    shares = (weights.gather(2, positions) * real).sum(dim=2)
    # Rounding must not show where everything is read.
    return Choice(selection, shares.masked_fill((selection.counts >= lengths)[:, None], 1.0))


def token_ids(starts: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Int64[B * width]: the rows of every sequence, its last one again behind its end."""
    columns = torch.arange(width, device=starts.device)
    return (starts[:, None] + columns.minimum(lengths[:, None] - 1)).view(-1)


def attention_weights(query: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
    """Softmax weights Float32[B, H, S] of query `[B, H, D]` over keys Float32[B * S, G, D]; 0 from `lengths[b]` on."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    keys = keys.view(num_seqs, -1, num_kv_heads, head_dim).permute(0, 2, 3, 1)  # [B, G, D, S]
    hidden = torch.arange(keys.shape[-1], device=keys.device) >= lengths[:, None]
    grouped = query.float().view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim) * head_dim**-0.5
    weights = (grouped @ keys).masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)
    return weights.view(num_seqs, num_heads, -1)
