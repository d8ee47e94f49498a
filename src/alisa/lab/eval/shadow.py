"""What every policy would read if it ran together with dense attention: its selections for the same queries and keys.

The model runs densely, all tokens of a window at once, so that every policy is judged by the same attention weights and
no difference comes from what it did to the layers before. The policy runs in a session of its own and sees what it
would see in decoding; what comes out of that is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alisa.kernels.base import Codec
from alisa.kernels.reference.softcap import softcapped
from alisa.lab.eval.layerwise import LayerSession, dense_attention, layer_sessions
from alisa.lab.scoring import Scorer
from alisa.policy.base import SelectionPolicy


class ShadowLayer(NamedTuple):
    """One layer of some windows: rows are the R decoded tokens, columns all T tokens."""

    layer: int
    """Its number among those without a sliding window: in the others nothing is chosen."""
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
        tell: called with each layer that has no sliding window.
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
        self._sessions = layer_sessions(scorer, policy, codec, num_seqs, prompt_len, length)
        self._codec = codec
        self._prompt_len, self._length = prompt_len, length
        self._shape = scorer.decoder.spec.attention
        self._num_sets = policy.num_sets(self._shape)
        self._tell = tell

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """One layer: q `[B, T, H, D]`, k and v `[B, T, G, D]`, returns `[B, T, H, D]`."""
        keys, values = (
            half.view(k.shape).to(q.dtype)
            for half in self._codec.decode(self._codec.encode(k.flatten(0, 1), v.flatten(0, 1)))
        )
        window, softcap = self._shape.window(layer), self._shape.softcap
        if window is None:
            number = self._shape.among_full(layer)
            read = self._select(self._sessions[number], q, k, v, hidden)
            self._tell(ShadowLayer(number, self._weights(q, keys), read))
        sequences = zip(q, keys, values, strict=True)
        return torch.stack([dense_attention(*sequence, window, softcap) for sequence in sequences])

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Dense weights of the decoded rows, Float32[B, H, R, T]."""
        group = q.shape[2] // k.shape[2]
        rows = q[:, self._prompt_len :].float().transpose(1, 2) * q.shape[-1] ** -0.5  # [B, H, R, D]
        columns = k.float().permute(0, 2, 3, 1).repeat_interleave(group, dim=1)  # [B, H, D, T]
        scores = rows @ columns
        if self._shape.softcap is not None:
            scores = softcapped(scores, self._shape.softcap)
        places = torch.arange(self._length, device=q.device)
        return scores.masked_fill_(places > places[self._prompt_len :, None], -torch.inf).softmax(dim=-1)

    def _select(self, session: LayerSession, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """Selections of all decoded rows, Bool[B, J, R, T]."""
        num_rows = self._length - self._prompt_len
        read = torch.zeros(len(q), self._num_sets, num_rows, self._length, dtype=torch.bool, device=q.device)
        session.prefill(q, k, v, hidden)
        for start, end in session.steps():
            session.decode(start, end, q, k, v, hidden)
            selection = session.selection
            counts = selection.counts[:, None, None]
            positions = selection.by_query().to(torch.int64)
            real = torch.arange(positions.shape[-1], device=counts.device) < counts
            found = torch.zeros(*positions.shape[:2], self._length, dtype=torch.int32, device=counts.device)
            found.scatter_add_(2, positions, real.expand_as(positions).to(torch.int32))
            rows = slice(start - self._prompt_len, end - self._prompt_len)
            read[:, :, rows] = (found > 0).unflatten(0, (len(q), end - start)).transpose(1, 2)
        return read
