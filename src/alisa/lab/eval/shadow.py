"""What every policy would read if it ran together with dense attention: its selections for the same queries and keys.

The model runs densely, all tokens of a window at once, so that every policy is judged by the same attention weights and
no difference comes from what it did to the layers before. The policy sees what it would see in decoding: the queries,
and the weights over the tokens that it selects, which add up to one for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.kernels.base import Codec, StepBatch
from alisa.kernels.reference.prefill import causal_attention, causal_mass
from alisa.lab.scoring import Scorer
from alisa.policy.base import SelectionPolicy


class ShadowLayer(NamedTuple):
    """One layer of some windows: rows are the R decoded tokens, columns all T tokens."""

    layer: int
    weights: Tensor
    """Float32[B, H, R, T]: dense attention weights."""
    read: Tensor
    """Bool[B, J, R, T]: what the policy reads."""

    @property
    def read_by_head(self) -> Tensor:
        """Bool[B, H or 1, R, T]: the same for each query head; 1 where all heads share it."""
        num_sets = self.read.shape[1]
        return self.read if num_sets == 1 else self.read.repeat_interleave(self.weights.shape[1] // num_sets, dim=1)


class ShadowAttend:
    """Dense attention over whole windows of equal length that tells each layer's weights and selections.

    Args:
        scorer: gives the spec and the kernels.
        policy: looks on.
        codec: what keys and values go through.
        num_seqs: B.
        prompt_len: tokens in front of the decoded ones.
        length: T.
        tell: called with each layer.
    """

    def __init__(
        self,
        scorer: Scorer,
        policy: SelectionPolicy,
        codec: Codec,
        *,
        num_seqs: int,
        prompt_len: int,
        length: int,
        tell: Callable[[ShadowLayer], None],
    ) -> None:
        spec, device = scorer.decoder.spec, scorer.decoder.device
        self._policy = policy
        self._codec = codec
        self._prompt_len, self._length = prompt_len, length
        self._num_sets = policy.num_sets(spec)
        self._state = policy.start(spec, num_seqs, length, device, scorer.kernels.selection)
        self._req_indices = tuple(range(num_seqs))
        self._req_index = torch.arange(num_seqs, device=device)
        self._tell = tell

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, returns `[B, T, H, D]`."""
        keys, values = (
            half.view(k.shape).to(q.dtype)
            for half in self._codec.decode(self._codec.encode(k.flatten(0, 1), v.flatten(0, 1)))
        )
        for req_idx in self._req_indices:
            self._state.open(req_idx, self._length)
            self._seed(layer, req_idx, q[req_idx], keys[req_idx], values[req_idx])
        weights = self._weights(q, keys)
        self._tell(ShadowLayer(layer, weights, self._select(layer, q, keys, values, weights)))
        return torch.stack(
            [causal_attention(q[req_idx], keys[req_idx], values[req_idx]) for req_idx in self._req_indices]
        )

    def _seed(self, layer: int, req_idx: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """What the policy wants to know of the prompt."""
        span = slice(self._prompt_len)
        positions = torch.arange(self._prompt_len, device=q.device)
        self._state.remember(layer, torch.full_like(positions, req_idx), positions, k[span], v[span])
        if seed_rows := self._policy.seed_rows(self._prompt_len):
            for first, mass in causal_mass(q[span][-seed_rows:], k[span], self._num_sets):
                self._state.seed(layer, req_idx, first, 0, mass)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Dense weights of the decoded rows, Float32[B, H, R, T]."""
        group = q.shape[2] // k.shape[2]
        rows = q[:, self._prompt_len :].float().transpose(1, 2) * q.shape[-1] ** -0.5  # [B, H, R, D]
        columns = k.float().permute(0, 2, 3, 1).repeat_interleave(group, dim=1)  # [B, H, D, T]
        scores = rows @ columns
        places = torch.arange(self._length, device=q.device)
        return scores.masked_fill_(places > places[self._prompt_len :, None], -torch.inf).softmax(dim=-1)

    def _select(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        """Selections of all decoded rows, Bool[B, J, R, T]."""
        num_seqs, num_heads, num_rows, length = weights.shape
        read = torch.zeros(num_seqs, self._num_sets, num_rows, length, dtype=torch.bool, device=weights.device)
        by_set = (num_seqs, self._num_sets, num_heads // self._num_sets, length)
        for row in range(num_rows):
            position = self._prompt_len + row
            lengths = torch.full_like(self._req_index, position + 1, dtype=torch.int32)
            self._state.begin(StepBatch(self._req_indices, (position + 1,) * num_seqs, self._req_index, lengths))
            self._state.remember(layer, self._req_index, lengths.to(torch.int64) - 1, k[:, position], v[:, position])
            selection = self._state.select(layer, q[:, position].contiguous())
            positions = selection.positions.to(torch.int64)
            real = torch.arange(positions.shape[-1], device=positions.device) < selection.counts[:, None, None]
            found = torch.zeros(num_seqs, self._num_sets, length, dtype=torch.int32, device=positions.device)
            found.scatter_add_(2, positions, real.expand_as(positions).to(torch.int32))
            read[:, :, row] = found > 0
            kept = weights[:, :, row].view(by_set) * read[:, :, row, None]
            mass = (kept / kept.sum(dim=-1, keepdim=True)).sum(dim=2)
            self._state.observe(layer, selection, mass.gather(2, positions) * real)
        return read
